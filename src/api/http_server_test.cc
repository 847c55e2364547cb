#include "src/api/http_server.h"

#include <gtest/gtest.h>

#include <atomic>
#include <random>

#include "src/api/test_support.h"

namespace tandem::api {
namespace {

using std::chrono::milliseconds;
using namespace std::string_literals;

HttpServerOptions quick_options() {
  HttpServerOptions options;
  options.max_body_bytes = 1 << 20;
  options.head_timeout = milliseconds(200);
  options.body_stall_timeout = milliseconds(200);
  options.body_timeout = milliseconds(2'000);
  options.write_timeout = milliseconds(300);
  options.idle_timeout = milliseconds(2'000);
  options.max_buffered_bytes = 64 << 10;
  options.send_buffer_bytes = 16 << 10;
  options.authorize = [](const HttpRequest& request) -> Status {
    const std::string* key = find_header(request.headers, "authorization");
    if (key != nullptr && *key == "Bearer k") return {};
    return make_error(ErrorKind::kUnauthenticated, "no key");
  };
  return options;
}

class HttpServerTest : public testing::Test {
 protected:
  HttpServerTest() { open(quick_options()); }
  ~HttpServerTest() override {
    loop.run([this] {
      kept.clear();
      server.reset();
    });
  }

  void open(HttpServerOptions options) {
    options.on_complete = [this](const HttpRecord& record) {
      records.push_back(fmt::format("{} {} {}", record.method, record.route, record.status));
    };
    loop.run([&] {
      kept.clear();
      server = std::move(HttpServer::listen(loop.io, "127.0.0.1", 0, std::move(options)).value());
      server->add_route({"GET", "/open", false, [](std::shared_ptr<HttpExchange> exchange) {
                           exchange->respond({200, {}, "text/plain", "hello"});
                         }});
      server->add_route({"GET", "/secret", true, [](std::shared_ptr<HttpExchange> exchange) {
                           exchange->respond({200, {}, "text/plain", "secret"});
                         }});
      server->add_route({"GET", "/items/*", false, [](std::shared_ptr<HttpExchange> exchange) {
                           exchange->respond({200, {}, "text/plain", exchange->request().path_tail});
                         }});
      server->add_route({"POST", "/echo", false, [this](std::shared_ptr<HttpExchange> exchange) {
                           ++num_handled;
                           exchange->respond({200, {}, "text/plain", exchange->request().body});
                         }});
      server->add_route({"POST", "/keep", false, [this](std::shared_ptr<HttpExchange> exchange) {
                           exchange->on_disconnect([this] { ++num_left; });
                           kept.push_back(std::move(exchange));
                         }});
      server->add_route({"POST", "/drop", false, [](std::shared_ptr<HttpExchange>) {}});
      server->start();
      port = server->port();
    });
  }

  size_t num_connections() {
    return loop.run([this] { return server->num_connections(); });
  }
  // What the server answers to `bytes`, and whether it closes then.
  RawResponse answer(std::string_view bytes, bool& closed) {
    RawSocket socket(port);
    socket.send(bytes);
    const RawResponse response = socket.read_response();
    closed = socket.is_closed_within(milliseconds(100));
    return response;
  }

  LoopThread loop;
  std::unique_ptr<HttpServer> server;
  std::vector<std::shared_ptr<HttpExchange>> kept;  // by /keep; of the loop's thread
  std::vector<std::string> records;
  std::atomic<int> num_left{0}, num_handled{0};
  uint16_t port = 0;
};

TEST_F(HttpServerTest, AnswersAndKeepsTheConnection) {
  RawSocket socket(port);
  for (int i = 0; i < 3; ++i) {
    const RawResponse response = socket.exchange(get_text("/open?x=1"));
    EXPECT_EQ(response.status, 200);
    EXPECT_EQ(response.body, "hello");
    EXPECT_FALSE(response.headers.contains("connection"));
    EXPECT_TRUE(response.headers.at("date").ends_with(" GMT"));
  }
  EXPECT_EQ(socket.exchange(post_text("/echo", "{}")).body, "{}");
  EXPECT_EQ(socket.exchange(get_text("/items/a/b%2Fc")).body, "a/b%2Fc");
  EXPECT_EQ(num_connections(), 1U);
  EXPECT_EQ(socket.exchange(get_text("/open", "Connection: close\r\n")).headers.at("connection"), "close");
  EXPECT_TRUE(socket.is_closed_within(milliseconds(500)));
}

struct HttpCase {
  const char* name;
  std::string bytes;
  int status;
  const char* code;  // null: JSON null
  bool closes;
};

std::string repeat(std::string_view text, size_t count) {
  std::string out;
  for (size_t i = 0; i < count; ++i) out += text;
  return out;
}

TEST_F(HttpServerTest, RefusesBadFramingAndRouting) {
  const std::string json = "Content-Type: application/json\r\n";
  const std::string post = "POST /echo HTTP/1.1\r\nHost: h\r\n" + json;
  const std::vector<HttpCase> cases = {
      {"both framings", post + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "bad_request",
       true},
      {"both, other order", post + "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400,
       "bad_request", true},
      {"chunked twice", post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400,
       "bad_request", true},
      {"identity", post + "Transfer-Encoding: identity\r\n\r\n", 501, "not_implemented", true},
      {"chunked, identity", post + "Transfer-Encoding: chunked, identity\r\n\r\n", 501, "not_implemented", true},
      {"gzip, chunked", post + "Transfer-Encoding: gzip, chunked\r\n\r\n", 501, "not_implemented", true},
      {"coding in 1.0", "POST /echo HTTP/1.0\r\n" + json + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400,
       "bad_request", true},
      {"two lengths", post + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", 400, "bad_request", true},
      {"two equal lengths", post + "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400, "bad_request", true},
      {"length -1", post + "Content-Length: -1\r\n\r\n", 400, "bad_request", true},
      {"length +5", post + "Content-Length: +5\r\n\r\n", 400, "bad_request", true},
      {"length 0x10", post + "Content-Length: 0x10\r\n\r\n", 400, "bad_request", true},
      {"length list", post + "Content-Length: 2, 2\r\n\r\n{}", 400, "bad_request", true},
      {"length empty", post + "Content-Length:\r\n\r\n", 400, "bad_request", true},
      {"length 2^64", post + "Content-Length: 18446744073709551616\r\n\r\n", 400, "bad_request", true},
      {"folded header", "GET /open HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n", 400, "bad_request", true},
      {"space before colon", "GET /open HTTP/1.1\r\nHost: h\r\nX : a\r\n\r\n", 400, "bad_request", true},
      {"NUL", "GET /open HTTP/1.1\r\nHost: h\r\nX: a\0b\r\n\r\n"s, 400, "bad_request", true},
      {"bare CR", "GET /open HTTP/1.1\r\nHost: h\r\nX: a\rb\r\n\r\n", 400, "bad_request", true},
      {"bare LF", "GET /open HTTP/1.1\r\nHost: h\nX: b\r\n\r\n", 400, "bad_request", true},
      {"no colon", "GET /open HTTP/1.1\r\nHost: h\r\nhello\r\n\r\n", 400, "bad_request", true},
      {"empty name", "GET /open HTTP/1.1\r\nHost: h\r\n: x\r\n\r\n", 400, "bad_request", true},
      {"big head", "GET /open HTTP/1.1\r\nHost: h\r\nX: " + repeat("a", 17 << 10), 431, "headers_too_large", true},
      {"many headers", "GET /open HTTP/1.1\r\nHost: h\r\n" + repeat("X: a\r\n", 100) + "\r\n", 431, "too_many_headers",
       true},
      {"long URI", "GET /" + repeat("a", 9 << 10) + " HTTP/1.1\r\nHost: h\r\n\r\n", 414, "uri_too_long", true},
      {"endless URI", "GET /" + repeat("a", 20 << 10), 414, "uri_too_long", true},
      {"no host", "GET /open HTTP/1.1\r\n\r\n", 400, "bad_request", true},
      {"two hosts", "GET /open HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "bad_request", true},
      {"bad host", "GET /open HTTP/1.1\r\nHost: a/secret?b\r\n\r\n", 400, "bad_request", true},
      {"empty host", "GET /open HTTP/1.1\r\nHost:\r\n\r\n", 400, "bad_request", true},
      {"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad_request", true},
      {"TLS hello", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"s, 400, "bad_request", true},
      {"HTTP/1.2", "GET /open HTTP/1.2\r\nHost: h\r\n\r\n", 400, "bad_request", true},
      {"HTTP/0.9", "GET /open\r\n\r\n", 400, "bad_request", true},
      {"space in target", "GET /open /x HTTP/1.1\r\nHost: h\r\n\r\n", 400, "bad_request", true},
      {"body over limit", post + "Content-Length: 1048577\r\n\r\n", 413, "request_too_large", true},
      {"chunks over limit", post + "Transfer-Encoding: chunked\r\n\r\n200000\r\n", 413, "request_too_large", true},
      {"chunk size overflow", post + "Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n", 400, "bad_request",
       true},
      {"chunk size not hex", post + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400, "bad_request", true},
      {"chunk size negative", post + "Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400, "bad_request", true},
      {"huge extension", post + "Transfer-Encoding: chunked\r\n\r\n1;" + repeat("a", 40 << 10), 400, "bad_request",
       true},
      {"huge trailer", post + "Transfer-Encoding: chunked\r\n\r\n0\r\n" + repeat("X: a\r\n", 8 << 10), 400,
       "bad_request", true},
      {"chunk without CRLF", post + "Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", 400, "bad_request", true},
      {"head stall", "GET /open HT", 408, "request_timeout", true},
      {"body stall", post + "Content-Length: 10\r\n\r\n{", 408, "request_timeout", true},
      {"gzip", post + "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 415, "unsupported_media_type", true},
      {"no type", "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}", 415, "unsupported_media_type", true},
      {"text type", "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}", 415,
       "unsupported_media_type", true},
      {"form type", "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Type: application/jsonx\r\nContent-Length: 2\r\n\r\n{}",
       415, "unsupported_media_type", true},
      {"expectation", post + "Expect: tea\r\nContent-Length: 2\r\n\r\n{}", 417, "expectation_failed", true},
      {"unknown method", "BREW /open HTTP/1.1\r\nHost: h\r\n\r\n", 405, "method_not_allowed", false},
      {"wrong method", "GET /echo HTTP/1.1\r\nHost: h\r\n\r\n", 405, "method_not_allowed", false},
      {"head on post", "HEAD /nowhere HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", 404, nullptr, true},
      {"unknown path", get_text("/nowhere"), 404, nullptr, false},
      {"double slash", get_text("//open"), 404, nullptr, false},
      {"dot dot", get_text("/open/../secret"), 404, nullptr, false},
      {"encoded dots", get_text("/%2e%2e/secret"), 404, nullptr, false},
      {"upper case", get_text("/OPEN"), 404, nullptr, false},
      {"authority form", "CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n", 404, nullptr, false},
      {"secret", get_text("/secret"), 401, nullptr, false},
      {"secret by absolute URI", "GET http://evil/secret HTTP/1.1\r\nHost: /open\r\n\r\n", 400, "bad_request", true},
      {"secret by absolute URI 2", "GET http://evil/secret HTTP/1.1\r\nHost: open\r\n\r\n", 401, nullptr, false},
  };
  for (const HttpCase& c : cases) {
    SCOPED_TRACE(c.name);
    bool closed = false;
    if (c.bytes.starts_with("HEAD")) {
      RawSocket socket(port);
      socket.send(c.bytes);
      EXPECT_EQ(socket.read_response(false).status, c.status);
      continue;
    }
    const RawResponse response = answer(c.bytes, closed);
    EXPECT_EQ(response.status, c.status) << response.body;
    EXPECT_EQ(closed, c.closes);
    const std::string code = c.code == nullptr ? "null" : fmt::format("\"{}\"", c.code);
    EXPECT_NE(response.body.find(fmt::format("\"code\":{}}}}}", code)), std::string::npos) << response.body;
    if (response.status == 405) {
      EXPECT_TRUE(response.headers.contains("allow"));
    }
    if (response.status == 401) {
      EXPECT_EQ(response.headers.at("www-authenticate"), "Bearer");
    }
  }
  EXPECT_EQ(num_handled, 0);
}

TEST_F(HttpServerTest, ChecksTheKeyOnlyWhereAsked) {
  RawSocket socket(port);
  EXPECT_EQ(socket.exchange(get_text("/secret", "Authorization: Bearer k\r\n")).status, 200);
  EXPECT_EQ(socket.exchange(get_text("/secret", "Authorization: Bearer x\r\n")).status, 401);
  // A method that is not the route's own must not get past the key.
  EXPECT_EQ(socket.exchange("OPTIONS /secret HTTP/1.1\r\nHost: h\r\n\r\n").status, 204);
  socket.send("HEAD /secret HTTP/1.1\r\nHost: h\r\n\r\n");
  EXPECT_EQ(socket.read_response(/*has_body=*/false).status, 401);
}

TEST_F(HttpServerTest, AnswersHeadAndOptions) {
  RawSocket socket(port);
  socket.send("HEAD /open HTTP/1.1\r\nHost: h\r\n\r\n");
  const RawResponse head = socket.read_response(/*has_body=*/false);
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.headers.at("content-length"), "5");
  const RawResponse options = socket.exchange("OPTIONS /echo HTTP/1.1\r\nHost: h\r\n\r\n");
  EXPECT_EQ(options.status, 204);
  EXPECT_EQ(options.headers.at("allow"), "POST, OPTIONS");
  EXPECT_EQ(socket.exchange(get_text("/echo")).headers.at("allow"), "POST, OPTIONS");
}

TEST_F(HttpServerTest, TakesChunksOfOneByteInBoundedMemory) {
  std::string body(200'000, 'x');
  RawSocket socket(port);
  socket.send(
      "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Type: application/json; charset=utf-8\r\n"
      "Transfer-Encoding: chunked\r\n\r\n");
  std::thread writer([&] {
    socket.send(repeat("1\r\nx\r\n", body.size()));
    socket.send("0\r\nX-Trailer: a\r\n\r\n");
  });
  const RawResponse response = socket.read_response();
  writer.join();
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.body, body);
}

TEST_F(HttpServerTest, TakesARequestInAnySplit) {
  const std::string request = post_text("/echo", "{\"a\":1}");
  std::mt19937 random(17);
  for (int round = 0; round < 20; ++round) {
    RawSocket socket(port);
    for (size_t i = 0; i < request.size();) {
      const size_t n = std::min<size_t>(1 + random() % 40, request.size() - i);
      socket.send(request.substr(i, n));
      i += n;
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    EXPECT_EQ(socket.read_response().body, "{\"a\":1}");
  }
}

TEST_F(HttpServerTest, AnswersPipelinedRequestsInOrder) {
  RawSocket socket(port);
  std::string requests;
  for (int i = 0; i < 20; ++i) requests += post_text("/echo", std::to_string(i));
  socket.send("\r\n" + requests);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(socket.read_response().body, std::to_string(i));
}

TEST_F(HttpServerTest, DoesNotInterleaveAPipelinedRequestWithAStream) {
  RawSocket socket(port);
  socket.send(post_text("/keep", "{}") + get_text("/open"));
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 1; }); }));
  loop.run([this] {
    kept[0]->start_stream({200, {}, "text/event-stream", ""});
    kept[0]->write("data: 1\n\n");
  });
  ASSERT_TRUE(socket.receive_until("data: 1\n\n"));
  EXPECT_FALSE(socket.receive(milliseconds(50)));
  loop.run([this] {
    kept[0]->write("data: 2\n\n");
    kept[0]->finish();
  });
  EXPECT_EQ(socket.read_response().body, "data: 1\n\ndata: 2\n\n");
  EXPECT_EQ(socket.read_response().body, "hello");
}

TEST_F(HttpServerTest, ClosesAfterTooMuchPipelinedInput) {
  RawSocket socket(port);
  socket.send(post_text("/keep", "{}"));
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 1; }); }));
  socket.send(repeat(get_text("/open"), 10'000));
  loop.run([this] { kept[0]->respond({200, {}, "text/plain", "kept"}); });
  EXPECT_EQ(socket.read_response().body, "kept");
  EXPECT_TRUE(socket.is_closed_within(milliseconds(2'000)));
  EXPECT_EQ(socket.buffered, "");
}

TEST_F(HttpServerTest, StreamsToOldClientsUntilClose) {
  RawSocket socket(port);
  socket.send("POST /keep HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}");
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 1; }); }));
  loop.run([this] {
    kept[0]->start_stream({200, {}, "text/event-stream", ""});
    kept[0]->write("data: 1\n\n");
    kept[0]->finish();
  });
  EXPECT_TRUE(socket.is_closed_within(milliseconds(2'000)));
  EXPECT_TRUE(socket.buffered.ends_with("\r\n\r\ndata: 1\n\n"));
  EXPECT_EQ(socket.buffered.find("chunked"), std::string::npos);
}

TEST_F(HttpServerTest, NoticesAtOnceThatAClientLeft) {
  for (int way = 0; way < 4; ++way) {
    SCOPED_TRACE(way);
    num_left = 0;
    RawSocket socket(port);
    socket.send(post_text("/keep", "{}"));
    ASSERT_TRUE(eventually([this] { return loop.run([this] { return !kept.empty(); }); }));
    if (way == 1) {
      loop.run([this] {
        kept[0]->start_stream({200, {}, "text/event-stream", ""});
        kept[0]->write("data: 1\n\n");
      });
      ASSERT_TRUE(socket.receive_until("data: 1\n\n"));
    }
    const auto begin = std::chrono::steady_clock::now();
    if (way == 2) {
      socket.reset();
    } else if (way == 3) {
      socket.shutdown_send();
    } else {
      socket.close();
    }
    ASSERT_TRUE(eventually([this] { return num_left == 1; }, milliseconds(100)));
    EXPECT_LT(std::chrono::steady_clock::now() - begin, milliseconds(100));
    loop.run([this] {
      EXPECT_FALSE(kept[0]->is_open());
      kept[0]->write("ignored");
      kept[0]->finish();
      kept.clear();
    });
    EXPECT_TRUE(eventually([this] { return num_connections() == 0; }));
  }
  EXPECT_EQ(loop.run([this] { return records; }), (std::vector<std::string>(4, "POST /keep 499")));
}

TEST_F(HttpServerTest, AnswersAClientThatHalfClosedIfTheAnswerIsReady) {
  RawSocket socket(port);
  socket.send(get_text("/open"));
  socket.shutdown_send();
  EXPECT_EQ(socket.read_response().body, "hello");
}

TEST_F(HttpServerTest, CutsASlowReaderAndOnlyIt) {
  RawSocket slow(port, /*receive_buffer_bytes=*/4096);
  RawSocket quick(port);
  slow.send(post_text("/keep", "{}"));
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 1; }); }));
  quick.send(post_text("/keep", "{}"));
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 2; }); }));
  const std::string event = "data: " + repeat("x", 1'000) + "\n\n";
  size_t num_quick_bytes = 0;
  loop.run([this] {
    for (auto& exchange : kept) exchange->start_stream({200, {}, "text/event-stream", ""});
  });
  for (int i = 0; i < 2'000 && num_left == 0; ++i) {
    loop.run([&] {
      for (auto& exchange : kept) exchange->write(event);
    });
    if (quick.receive(milliseconds(100))) num_quick_bytes += quick.buffered.size();
    quick.buffered.clear();
  }
  EXPECT_EQ(num_left, 1);
  loop.run([this] {
    EXPECT_FALSE(kept[0]->is_open());
    EXPECT_TRUE(kept[1]->is_open());
    kept[1]->finish();
  });
  EXPECT_GT(num_quick_bytes, 10'000U);
}

TEST_F(HttpServerTest, CutsAClientThatStopsReading) {
  RawSocket slow(port, /*receive_buffer_bytes=*/4096);
  slow.send(post_text("/keep", "{}"));
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 1; }); }));
  // A whole answer may be larger than the buffer of a stream, but a client must go on reading it.
  loop.run([this] { kept[0]->respond({200, {}, "text/plain", std::string(8 << 20, 'x')}); });
  EXPECT_TRUE(eventually([this] { return num_connections() == 0; }, milliseconds(3'000)));
}

TEST_F(HttpServerTest, TellsThatACompleteAnswerWasNotSent) {
  std::atomic<int> num_unsent{0};
  const std::string body(8 << 20, 'x');
  const auto answer = [&](size_t index) {
    ASSERT_TRUE(eventually([&] { return loop.run([&] { return kept.size() == index + 1; }); }));
    loop.run([&] {
      kept[index]->on_unsent([&num_unsent] { ++num_unsent; });
      kept[index]->respond({200, {}, "text/plain", body});
    });
  };
  RawSocket whole(port);
  whole.send(post_text("/keep", "{}"));
  answer(0);
  EXPECT_EQ(whole.read_response().body.size(), body.size());
  RawSocket part(port);
  part.send(post_text("/keep", "{}"));
  answer(1);
  ASSERT_TRUE(part.receive_until("xxx"));
  EXPECT_EQ(num_unsent, 0);
  part.close();
  EXPECT_TRUE(eventually([&] { return num_unsent == 1; }, milliseconds(1'000)));
  // One that has left before the answer is told of by on_disconnect alone.
  RawSocket early(port);
  early.send(post_text("/keep", "{}"));
  ASSERT_TRUE(eventually([&] { return loop.run([&] { return kept.size() == 3; }); }));
  loop.run([&] { kept[2]->on_unsent([&num_unsent] { ++num_unsent; }); });
  early.close();
  EXPECT_TRUE(eventually([this] { return num_left == 1; }));
  EXPECT_TRUE(eventually([this] { return num_connections() == 1; }));
  EXPECT_EQ(num_unsent, 1);
}

TEST_F(HttpServerTest, SendsLargeAnswersWhole) {
  RawSocket socket(port);
  socket.send(post_text("/keep", "{}"));
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 1; }); }));
  const std::string body(8 << 20, 'x');
  loop.run([&] { kept[0]->respond({200, {}, "text/plain", body}); });
  EXPECT_EQ(socket.read_response().body, body);
}

TEST_F(HttpServerTest, SendsContinueOnlyForAnAdmissibleRequest) {
  RawSocket socket(port);
  const std::string head =
      "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n";
  socket.send(head + "Content-Length: 2\r\n\r\n");
  ASSERT_TRUE(socket.receive_until("HTTP/1.1 100 Continue\r\n\r\n"));
  socket.buffered.clear();
  socket.send("{}");
  EXPECT_EQ(socket.read_response().body, "{}");
  socket.send(head + "Content-Length: 99999999\r\n\r\n");
  EXPECT_EQ(socket.read_response().status, 413);
}

TEST_F(HttpServerTest, DispatchesNothingForACutBody) {
  RawSocket socket(port);
  socket.send("POST /echo HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{}");
  socket.shutdown_send();
  EXPECT_TRUE(socket.is_closed_within(milliseconds(1'500)));
  EXPECT_EQ(num_handled, 0);
  EXPECT_EQ(socket.buffered, "");
}

TEST_F(HttpServerTest, AnswersADroppedRequest) {
  RawSocket socket(port);
  EXPECT_EQ(socket.exchange(post_text("/drop", "{}")).status, 500);
  EXPECT_EQ(socket.exchange(get_text("/open")).status, 200);
}

TEST_F(HttpServerTest, BoundsBodiesOfAllRequestsTogether) {
  HttpServerOptions options = quick_options();
  options.max_total_body_bytes = 1'500'000;
  options.body_stall_timeout = milliseconds(5'000);
  open(std::move(options));
  RawSocket first(port), second(port);
  const std::string head =
      "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n";
  first.send(head + std::string(999'999, 'x'));
  std::this_thread::sleep_for(milliseconds(100));
  second.send(head + std::string(999'999, 'x'));
  EXPECT_EQ(second.read_response().status, 503);
  first.send("x");
  EXPECT_EQ(first.read_response().status, 200);
  RawSocket third(port);  // what the others held was given back
  third.send(head + std::string(1'000'000, 'x'));
  EXPECT_EQ(third.read_response().status, 200);
}

TEST_F(HttpServerTest, BoundsConnections) {
  HttpServerOptions options = quick_options();
  options.max_connections = 2;
  open(std::move(options));
  RawSocket first(port), second(port);
  ASSERT_EQ(first.exchange(get_text("/open")).status, 200);
  ASSERT_EQ(second.exchange(get_text("/open")).status, 200);
  RawSocket third(port);
  EXPECT_EQ(third.read_response().status, 503);
  first.close();
  EXPECT_TRUE(eventually([this] { return num_connections() == 1; }));
  EXPECT_EQ(RawSocket(port).exchange(get_text("/open")).status, 200);
}

TEST_F(HttpServerTest, ClosesIdleConnections) {
  HttpServerOptions options = quick_options();
  options.idle_timeout = milliseconds(100);
  open(std::move(options));
  RawSocket socket(port);
  EXPECT_TRUE(socket.is_closed_within(milliseconds(1'500)));
  EXPECT_EQ(socket.buffered, "");
}

TEST_F(HttpServerTest, DrainsRunningRequests) {
  RawSocket idle(port), busy(port);
  ASSERT_EQ(idle.exchange(get_text("/open")).status, 200);
  busy.send(post_text("/keep", "{}"));
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return kept.size() == 1; }); }));
  std::atomic<bool> is_idle{false};
  loop.run([&] { server->drain([&is_idle] { is_idle = true; }); });
  EXPECT_TRUE(idle.is_closed_within(milliseconds(1'500)));
  EXPECT_FALSE(is_idle);
  loop.run([this] { kept[0]->respond({200, {}, "text/plain", "done"}); });
  EXPECT_EQ(busy.read_response().body, "done");
  busy.close();
  EXPECT_TRUE(eventually([&is_idle] { return is_idle.load(); }));
}

TEST_F(HttpServerTest, RefusesATakenPort) {
  const Error error = loop.run([this] {
    const auto second = HttpServer::listen(loop.io, "127.0.0.1", port, {});
    return second.error();
  });
  EXPECT_NE(error.message.find(std::to_string(port)), std::string::npos);
  EXPECT_NE(error.message.find("--port"), std::string::npos);
}

TEST_F(HttpServerTest, ASharedSocketIsServedByWhoeverIsFree) {
  LoopThread other;
  std::unique_ptr<HttpServer> second;
  other.run([&] {
    second = std::move(HttpServer::share(other.io, *server, quick_options()).value());
    second->add_route({"GET", "/open", false, [](std::shared_ptr<HttpExchange> exchange) {
                         exchange->respond({200, {}, "text/plain", "second"});
                       }});
    EXPECT_EQ(second->port(), port);
    second->start();
  });
  const auto ask = [this] {
    RawSocket client(port);
    client.send("GET /open HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    return client.read_response().body;
  };
  // While the first one is busy, the second serves; and the other way round.
  loop.run([&] { EXPECT_EQ(ask(), "second"); });
  other.run([&] { EXPECT_EQ(ask(), "hello"); });
  other.run([&] { second->drain([] {}); });
  for (int i = 0; i < 20; ++i) EXPECT_EQ(ask(), "hello");
  other.run([&] { second.reset(); });
}

}  // namespace
}  // namespace tandem::api
