#include "src/api/http_client.h"

#include <gtest/gtest.h>

#include <random>

#include "src/api/http_server.h"
#include "src/api/test_support.h"

namespace tandem::api {
namespace {

using std::chrono::milliseconds;

// A server that sends given bytes to whoever connects, to test what a well-behaved one would never send.
class ScriptedServer {
 public:
  explicit ScriptedServer(std::vector<std::string> answers) : listener_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    CHECK_EQ(::bind(listener_, reinterpret_cast<const sockaddr*>(&address), length), 0);
    CHECK_EQ(::listen(listener_, 16), 0);
    CHECK_EQ(::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length), 0);
    port = ntohs(address.sin_port);
    thread_ = std::thread([this, answers = std::move(answers)] {
      for (const std::string& answer : answers) {
        const int fd = ::accept(listener_, nullptr, nullptr);
        if (fd < 0) return;
        ++num_accepted;
        char buffer[65536];
        if (::recv(fd, buffer, sizeof buffer, 0) > 0) (void)!::send(fd, answer.data(), answer.size(), MSG_NOSIGNAL);
        ::shutdown(fd, SHUT_WR);
        while (::recv(fd, buffer, sizeof buffer, 0) > 0) {
        }
        ::close(fd);
      }
    });
  }
  ~ScriptedServer() {
    ::shutdown(listener_, SHUT_RDWR);
    thread_.join();
    ::close(listener_);
  }
  uint16_t port = 0;
  std::atomic<int> num_accepted{0};

 private:
  int listener_;
  std::thread thread_;
};

HttpUrl url_of(uint16_t port) { return {"127.0.0.1", port, ""}; }

Result<ClientResponse> fetch_from(const std::string& answer, milliseconds idle_timeout = milliseconds(5'000)) {
  ScriptedServer server({answer});
  ClientRequest request;
  request.idle_timeout = idle_timeout;
  return fetch(url_of(server.port), request);
}

class HttpClientTest : public testing::Test {
 protected:
  HttpClientTest() {
    loop.run([this] {
      server = std::move(HttpServer::listen(loop.io, "127.0.0.1", 0, {}).value());
      server->add_route({"POST", "/echo", false, [](std::shared_ptr<HttpExchange> exchange) {
                           exchange->respond({200, {}, "text/plain", exchange->request().body});
                         }});
      server->add_route({"POST", "/base/keep", false, [this](std::shared_ptr<HttpExchange> exchange) {
                           exchange->on_disconnect([this] { ++num_left; });
                           kept.push_back(std::move(exchange));
                         }});
      server->start();
      url = url_of(server->port());
      client = std::make_unique<HttpClient>(loop.io, HttpClientOptions());
    });
  }
  ~HttpClientTest() override {
    loop.run([this] {
      client.reset();
      kept.clear();
      server.reset();
    });
  }
  Result<ClientResponse> ask(ClientRequest request) {
    std::promise<Result<ClientResponse>> promise;
    loop.run([&] {
      client->start(url, std::move(request),
                    {.on_done = [&promise](Result<ClientResponse> r) { promise.set_value(std::move(r)); }});
    });
    return promise.get_future().get();
  }

  LoopThread loop;
  std::unique_ptr<HttpServer> server;
  std::unique_ptr<HttpClient> client;
  HttpUrl url;
  std::vector<std::shared_ptr<HttpExchange>> kept;
  std::atomic<int> num_left{0};
};

TEST_F(HttpClientTest, ReusesOneConnection) {
  for (int i = 0; i < 5; ++i) {
    const Result<ClientResponse> response = ask(json_request("/echo", std::to_string(i)));
    ASSERT_TRUE(response.ok());
    EXPECT_EQ(response->status, 200);
    EXPECT_EQ(response->body, std::to_string(i));
  }
  EXPECT_EQ(loop.run([this] { return server->num_connections(); }), 1U);
  const Result<ClientResponse> missing = ask(json_request("/nowhere", "{}"));
  EXPECT_EQ(missing->status, 404);
  EXPECT_EQ(error_from_response(missing->status, missing->body).message, "there is no route \"/nowhere\"");
}

TEST_F(HttpClientTest, StreamsEventsAndCancels) {
  url.path = "/base";
  std::vector<std::string> events;
  int num_done = 0;
  const auto start = [&] {
    return loop.run([&] {
      return client->start(url, json_request("/keep", "{}"),
                           {.on_event = [&](const SseEvent& event) { events.push_back(event.data); },
                            .on_done =
                                [&](Result<ClientResponse> response) {
                                  ++num_done;
                                  EXPECT_TRUE(response.ok());
                                }});
    });
  };
  start();
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 1; }); }));
  loop.run([this] {
    kept[0]->start_stream({200, {}, "text/event-stream; charset=utf-8", ""});
    kept[0]->write("data: {\"a\":1}\n\nda");
  });
  ASSERT_TRUE(eventually([&] { return loop.run([&] { return events.size() == 1; }); }));
  loop.run([this] {
    kept[0]->write("ta: b\ndata: c\n\n");
    kept[0]->write("data: [DONE]\n\n");
    kept[0]->finish();
  });
  ASSERT_TRUE(eventually([&] { return loop.run([&] { return num_done == 1; }); }));
  EXPECT_EQ(events, (std::vector<std::string>{"{\"a\":1}", "b\nc", "[DONE]"}));

  const CallId call = start();
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 2; }); }));
  loop.run([&] { client->cancel(call); });
  EXPECT_TRUE(eventually([this] { return num_left == 1; }, milliseconds(100)));
  EXPECT_EQ(loop.run([&] { return num_done; }), 1);
  EXPECT_EQ(loop.run([&] { return client->num_calls(); }), 0U);
}

// The server answers and the client leaves in the same moment.
TEST_F(HttpClientTest, AnAnswerUnderWayIsTakenFromWhomItLeaves) {
  url.path = "/base";
  std::optional<Result<ClientResponse>> outcome;
  const auto start = [&] {
    outcome.reset();
    return loop.run([&] {
      return client->start(url, json_request("/keep", "{}"),
                           {.on_done = [&outcome](Result<ClientResponse> response) { outcome = std::move(response); }});
    });
  };
  const auto is_done = [&] { return loop.run([&] { return outcome.has_value(); }); };
  const CallId answered = start();
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 1; }); }));
  loop.run([&] {
    kept[0]->respond({200, {}, "text/plain", "just in time"});
    client->leave(answered, milliseconds(1'000));
  });
  ASSERT_TRUE(eventually(is_done, milliseconds(500)));
  ASSERT_TRUE(outcome->ok()) << outcome->error().message;
  EXPECT_EQ((*outcome)->body, "just in time");
  EXPECT_EQ(num_left, 0);

  // One that has not answered learns at once that its client is gone, and says nothing any more.
  const CallId waiting = start();
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 2; }); }));
  loop.run([&] { client->leave(waiting, milliseconds(1'000)); });
  EXPECT_TRUE(eventually([this] { return num_left == 1; }, milliseconds(100)));
  ASSERT_TRUE(eventually(is_done, milliseconds(500)));
  EXPECT_EQ(outcome->error().kind, ErrorKind::kUnavailable);
  EXPECT_EQ(loop.run([&] { return client->num_calls(); }), 0U);

  // One that has not been sent is cancelled.
  outcome.reset();
  loop.run([&] {
    client->leave(client->start(url, json_request("/keep", "{}"), {.on_done = [&](auto) { ADD_FAILURE(); }}),
                  milliseconds(1'000));
    EXPECT_EQ(client->num_calls(), 0U);
  });
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_EQ(loop.run([this] { return kept.size(); }), 2U);
}

// Nobody waits for a server that neither answers nor closes.
TEST(HttpClient, LeavesWithinTheTimeGiven) {
  LoopThread loop;
  const int listener = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ASSERT_EQ(::bind(listener, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(::listen(listener, 1), 0);
  ASSERT_EQ(::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size), 0);
  std::unique_ptr<HttpClient> client;
  std::optional<Result<ClientResponse>> outcome;
  const CallId call = loop.run([&] {
    client = std::make_unique<HttpClient>(loop.io, HttpClientOptions());
    return client->start(url_of(ntohs(address.sin_port)), json_request("/", "{}"),
                         {.on_done = [&outcome](Result<ClientResponse> response) { outcome = std::move(response); }});
  });
  std::this_thread::sleep_for(milliseconds(50));  // the kernel takes the request for the server
  loop.run([&] { client->leave(call, milliseconds(100)); });
  EXPECT_TRUE(eventually([&] { return loop.run([&] { return outcome.has_value(); }); }, milliseconds(1'000)));
  EXPECT_EQ(outcome->error().kind, ErrorKind::kDeadlineExceeded);
  loop.run([&] { client.reset(); });
  ::close(listener);
}

TEST_F(HttpClientTest, MayBeCancelledInsideItsOwnHandler) {
  url.path = "/base";
  CallId call;
  int num_events = 0, num_done = 0;
  loop.run([&] {
    call = client->start(url, json_request("/keep", "{}"),
                         {.on_event =
                              [&](const SseEvent&) {
                                ++num_events;
                                client->cancel(call);
                              },
                          .on_done = [&](Result<ClientResponse>) { ++num_done; }});
  });
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 1; }); }));
  loop.run([this] {
    kept[0]->start_stream({200, {}, "text/event-stream", ""});
    kept[0]->write("data: 1\n\ndata: 2\n\n");
  });
  EXPECT_TRUE(eventually([this] { return num_left == 1; }));
  EXPECT_EQ(loop.run([&] { return num_events; }), 1);
  EXPECT_EQ(loop.run([&] { return num_done; }), 0);
}

TEST_F(HttpClientTest, EndsAtItsDeadlines) {
  url.path = "/base";
  ClientRequest request = json_request("/keep", "{}");
  request.idle_timeout = milliseconds(100);
  EXPECT_EQ(ask(request).error().kind, ErrorKind::kDeadlineExceeded);
  request.idle_timeout = milliseconds(60'000);
  request.total_timeout = milliseconds(100);
  EXPECT_EQ(ask(request).error().kind, ErrorKind::kDeadlineExceeded);
  EXPECT_TRUE(eventually([this] { return num_left == 2; }));
}

TEST_F(HttpClientTest, RefusesToSendALineBreak) {
  ClientRequest request = json_request("/echo", "{}");
  request.headers.emplace_back("X-Request-Id", "a\r\nX: b");
  EXPECT_EQ(ask(request).error().kind, ErrorKind::kInvalidArgument);
}

TEST(HttpClient, ReportsAnUnreachableHost) {
  uint16_t free_port = 0;
  {
    ScriptedServer server({});
    free_port = server.port;
  }
  const Result<ClientResponse> response = fetch(url_of(free_port), {});
  EXPECT_EQ(response.error().kind, ErrorKind::kUnavailable);
  EXPECT_NE(response.error().message.find(fmt::format("127.0.0.1:{}", free_port)), std::string::npos);
  EXPECT_EQ(fetch({"no-such-host.invalid", 80, ""}, {}).error().kind, ErrorKind::kUnavailable);
}

TEST(HttpClient, RetriesOnceOnAKeptConnectionThatWasClosed) {
  const std::string answer = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx";
  ScriptedServer server({answer, answer});
  LoopThread loop;
  HttpClient client(loop.io, {});
  for (int i = 0; i < 2; ++i) {
    std::promise<Result<ClientResponse>> promise;
    loop.run([&] {
      client.start(url_of(server.port), json_request("/", "{}"),
                   {.on_done = [&promise](Result<ClientResponse> r) { promise.set_value(std::move(r)); }});
    });
    const Result<ClientResponse> response = promise.get_future().get();
    ASSERT_TRUE(response.ok()) << response.error().message;
    EXPECT_EQ(response->body, "x");
  }
  EXPECT_EQ(server.num_accepted, 2);
  loop.stop();
}

// A server that closes without a word after it has read a request may have begun it, or died of it: only the caller may
// send it again.
TEST(HttpClient, NeverSendsAgainWhatTheServerHasRead) {
  LoopThread loop;
  HttpClient client(loop.io, {});
  int num_requests = 0;
  std::vector<std::shared_ptr<HttpExchange>> kept;
  std::unique_ptr<HttpServer> server;
  const auto listen = [&](uint16_t port) {
    server = HttpServer::listen(loop.io, "127.0.0.1", port, {}).value();
    server->add_route({"POST", "/", false, [&](std::shared_ptr<HttpExchange> exchange) {
                         kept.push_back(exchange);
                         if (++num_requests == 1) exchange->respond({200, {}, "text/plain", "x"});
                       }});
    server->start();
    return server->port();
  };
  const HttpUrl url = url_of(loop.run([&] { return listen(0); }));
  std::optional<Result<ClientResponse>> response;
  const auto ask = [&] {
    loop.run([&] {
      response.reset();
      client.start(url, json_request("/", "{}"),
                   {.on_done = [&](Result<ClientResponse> r) { response.emplace(std::move(r)); }});
    });
  };
  ask();
  ASSERT_TRUE(eventually([&] { return loop.run([&] { return response.has_value(); }); }));
  ASSERT_TRUE(response->ok());
  ask();  // on the kept connection
  ASSERT_TRUE(eventually([&] { return loop.run([&] { return num_requests == 2; }); }));
  loop.run([&] {  // it dies with the request in its hands and is back at once
    server.reset();
    listen(url.port);
  });
  ASSERT_TRUE(eventually([&] { return loop.run([&] { return response.has_value(); }); }));
  EXPECT_EQ(response->error().kind, ErrorKind::kUnavailable);
  EXPECT_EQ(response->error().code, "");  // not kConnectFailed: it was reached
  EXPECT_EQ(num_requests, 2);
  loop.run([&] {
    kept.clear();
    server.reset();
  });
  loop.stop();
}

TEST(HttpClient, ReadsEveryFraming) {
  EXPECT_EQ(fetch_from("HTTP/1.1 200 OK\r\n\r\nuntil close")->body, "until close");
  EXPECT_EQ(fetch_from("HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab")->body, "ab");
  EXPECT_EQ(fetch_from("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;x=y\r\na\r\n1\r\nb\r\n0\r\nT: x\r\n\r\n")
                ->body,
            "ab");
  EXPECT_EQ(fetch_from("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")->status, 204);
  EXPECT_EQ(fetch_from("HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")->status, 503);
}

TEST(HttpClient, ReadsAHeadLongerThanOneRead) {
  std::string head = "HTTP/1.1 200 OK\r\nContent-Length: 40000\r\n";
  for (int i = 0; i < 300; ++i) head += fmt::format("X-{}: {}\r\n", i, std::string(100, 'v'));
  const std::string body = std::string(20'000, 'a') + std::string(20'000, 'b');
  const Result<ClientResponse> response = fetch_from(head + "\r\n" + body);
  ASSERT_TRUE(response.ok()) << response.error().message;
  EXPECT_EQ(response->headers.size(), 301U);
  EXPECT_EQ(response->body, body);
}

TEST(HttpClient, LetsGoOfAHostThatIsNotAskedAnyMore) {
  boost::asio::io_context io;
  std::vector<std::unique_ptr<HttpServer>> servers;
  for (int i = 0; i < 2; ++i) {
    servers.push_back(HttpServer::listen(io, "127.0.0.1", 0, {}).value());
    servers.back()->add_route({"GET", "/", false, [](std::shared_ptr<HttpExchange> exchange) {
                                 exchange->respond({200, {}, "", "x"});
                               }});
    servers.back()->start();
  }
  HttpClient client(io, {.idle_keep = milliseconds(50)});
  const auto ask = [&](size_t server) {
    bool ok = false;
    client.start(url_of(servers[server]->port()), {},
                 {.on_done = [&ok](Result<ClientResponse> response) { ok = response.ok() && response->is_success(); }});
    io.restart();
    for (int i = 0; i < 1000 && !ok; ++i) io.run_for(milliseconds(5));
    EXPECT_TRUE(ok);
  };
  ask(0);
  EXPECT_EQ(servers[0]->num_connections(), 1U);
  for (int i = 0; i < 1000 && servers[0]->num_connections() > 0; ++i) {
    io.run_for(milliseconds(20));
    ask(1);
  }
  EXPECT_EQ(servers[0]->num_connections(), 0U);
  EXPECT_LE(servers[1]->num_connections(), 1U);
}

TEST(HttpClient, ReportsBrokenResponses) {
  EXPECT_EQ(fetch_from("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab").error().kind, ErrorKind::kUnavailable);
  EXPECT_EQ(fetch_from("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab").error().kind,
            ErrorKind::kUnavailable);
  EXPECT_EQ(fetch_from("").error().kind, ErrorKind::kUnavailable);
  EXPECT_EQ(fetch_from("220 smtp ready\r\n\r\n").error().kind, ErrorKind::kDataLoss);
  EXPECT_EQ(fetch_from("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n").error().kind,
            ErrorKind::kDataLoss);
  EXPECT_EQ(fetch_from("HTTP/1.1 200 OK\r\nX: " + std::string(200'000, 'x')).error().kind, ErrorKind::kDataLoss);
}

TEST(Sse, FindsEventsInAnySplit) {
  const std::string text =
      ": comment\n\ndata: one\n\ndata:two\r\ndata: lines\r\n\r\nevent: error\rdata\r\rid: 7\ndata: last\n\ndata: cut";
  const std::vector<std::string> expected = {"|one", "|two\nlines", "error|", "|last"};
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    SseParser parser;
    std::vector<std::string> events;
    for (size_t i = 0; i < text.size();) {
      const size_t n = round == 0 ? text.size() : std::min<size_t>(1 + random() % 7, text.size() - i);
      ASSERT_TRUE(parser
                      .feed(std::string_view(text).substr(i, n),
                            [&](const SseEvent& event) { events.push_back(event.event + "|" + event.data); })
                      .ok());
      i += n;
    }
    ASSERT_EQ(events, expected) << "seed 3, round " << round;
  }
}

TEST(Sse, RefusesAnEndlessEvent) {
  SseParser parser;
  const std::string chunk(1 << 20, 'x');
  Status status;
  for (int i = 0; i < 20 && status.ok(); ++i) status = parser.feed(chunk, [](const SseEvent&) {});
  EXPECT_FALSE(status.ok());
}

TEST(HttpUrl, ParsesAndRefuses) {
  const HttpUrl url = parse_http_url("http://worker-1:8100/base/").value();
  EXPECT_EQ(url.origin(), "worker-1:8100");
  EXPECT_EQ(url.path, "/base");
  EXPECT_EQ(parse_http_url("127.0.0.1:8000")->port, 8000);
  EXPECT_EQ(parse_http_url("http://h")->port, 80);
  EXPECT_EQ(parse_http_url("http://[::1]:81")->origin(), "[::1]:81");
  for (const char* bad : {"", "http://", "https://h", "http://h:0", "http://h:65536", "http://h:8x",
                          "http://h:", "http://[::1", "http://[::1]8", "http://u@h", "http://h/a b", "h:1:2"}) {
    EXPECT_FALSE(parse_http_url(bad).ok()) << bad;
  }
}

TEST(HttpTypes, DecodesPercent) {
  std::string out;
  EXPECT_TRUE(decode_percent("a%2Fb%c3%A4", out));
  EXPECT_EQ(out, "a/b\xC3\xA4");
  EXPECT_FALSE(decode_percent("a%2", out));
  EXPECT_FALSE(decode_percent("%zz", out));
}

}  // namespace
}  // namespace tandem::api
