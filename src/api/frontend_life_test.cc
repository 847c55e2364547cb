// Clients that leave or read slowly, and the states of the server: loading, serving, dead; with keys and without.
#include <algorithm>

#include "src/api/frontend_fixture.h"

namespace tandem::api {
namespace {

using engine::FinishReason;
using engine::TokenEvent;
using std::chrono::milliseconds;

class FrontendLifeTest : public FrontendTest {};

// ---- Long texts ----

std::string tokenize_text(size_t prompt_bytes) {
  return post_text("/tokenize", fmt::format("{{\"prompt\":\"{}\"}}", std::string(prompt_bytes, 'a')));
}

TEST_F(FrontendLifeTest, RefusesAPromptThatCannotFitWithoutTokenizingIt) {
  start();
  RawSocket socket(port);
  const std::string prompt = "\"" + std::string(30UL << 20, 'a') + "\"";
  const RawResponse response = socket.exchange(completion_text("", prompt));
  ASSERT_EQ(response.status, 400) << response.body.substr(0, 200);
  const Json error = parse(response.body)["error"];
  EXPECT_EQ(error["code"], "context_length_exceeded");
  EXPECT_EQ(error["param"], "prompt");
  const std::string message = error["message"];
  EXPECT_NE(message.find("has 200 tokens"), std::string::npos) << message;
  EXPECT_NE(message.find("at least"), std::string::npos) << message;
  EXPECT_NE(message.find("31457280 bytes"), std::string::npos) << message;
  EXPECT_NE(message.find("shorten"), std::string::npos) << message;
}

TEST_F(FrontendLifeTest, EndsTextsAtTheirDeadline) {
  FrontendOptions options;
  options.request_timeout_s = 0.01;
  start(std::move(options));
  const std::string request = tokenize_text(30UL << 20);
  std::vector<std::unique_ptr<RawSocket>> sockets;
  for (int i = 0; i < 6; ++i) {
    sockets.push_back(std::make_unique<RawSocket>(port));
    sockets.back()->send(request);
  }
  // The first may be done before anybody looks; the last waits behind all others.
  int num_late = 0;
  for (const auto& socket : sockets) num_late += socket->read_response().status == 504 ? 1 : 0;
  EXPECT_GT(num_late, 0);
}

TEST_F(FrontendLifeTest, TextsDoNotWaitBehindVeryLongOnes) {
  start();
  const std::string request = tokenize_text(30UL << 20);
  std::vector<std::unique_ptr<RawSocket>> large;
  for (int i = 0; i < 4; ++i) {
    large.push_back(std::make_unique<RawSocket>(port));
    large.back()->send(request);
  }
  RawSocket small(port);
  ASSERT_EQ(small.exchange(tokenize_text(100UL << 10)).status, 200);
  EXPECT_FALSE(large.back()->receive(milliseconds(0)));
}

TEST_F(FrontendLifeTest, ClosingEndsLongTextsAndSaysWhy) {
  start();
  const std::string request = tokenize_text(30UL << 20);
  std::vector<std::unique_ptr<RawSocket>> sockets;
  for (int i = 0; i < 4; ++i) {
    sockets.push_back(std::make_unique<RawSocket>(port));
    sockets.back()->send(request);
  }
  // Whoever is answered came after the last was read.
  ASSERT_EQ(RawSocket(port).exchange(get_text("/health")).status, 200);
  loop.run([this] { frontend->close(make_error(ErrorKind::kUnavailable, "the worker left")); });
  const int64_t closed_us = clock.now_us();
  const RawResponse last = sockets.back()->read_response();
  EXPECT_EQ(last.status, 503);
  EXPECT_NE(last.body.find("the worker left"), std::string::npos) << last.body.substr(0, 200);
  std::printf("ended %.0f ms after the close\n", static_cast<double>(clock.now_us() - closed_us) / 1000);
}

TEST_F(FrontendLifeTest, CountsTextsUntilTheirAnswerIsSent) {
  start();
  RawSocket socket(port);
  socket.send(tokenize_text(8UL << 20));
  ASSERT_TRUE(eventually([this] { return num_requests() == 1; }));
  loop.run([this] { frontend->drain(make_error(ErrorKind::kUnavailable, "the server is shutting down")); });
  // The answer is more than the kernel takes of it while nobody reads.
  ASSERT_TRUE(socket.receive(milliseconds(60'000)));
  EXPECT_EQ(num_requests(), 1);
  EXPECT_EQ(socket.read_response().status, 200);
  EXPECT_TRUE(eventually([this] { return num_requests() == 0; }));
}

// ---- Clients that leave ----

TEST_F(FrontendLifeTest, CancelsAtOnceWhenTheClientLeaves) {
  start();
  struct Phase {
    const char* name;
    bool stream;
    int num_tokens;  // that the worker sent before
    std::string more;
  };
  const std::vector<Phase> phases = {
      {"queued", false, 0, ""},
      {"queued, stream", true, 0, ""},
      {"reserved", true, -1, ""},
      {"decoding", false, 3, ""},
      {"decoding, stream", true, 3, ""},
      {"several choices", true, 1, ",\"n\":4"},
      {"held back by a stop string", true, 1, ",\"stop\":\"xyz\""},
  };
  for (const Phase& phase : phases) {
    SCOPED_TRACE(phase.name);
    const size_t base = worker->num_requests();
    const size_t num_choices = phase.more.find("\"n\":4") == std::string::npos ? 1 : 4;
    {
      RawSocket socket(port);
      socket.send(completion_text(fmt::format(R"("stream":{}{})", phase.stream, phase.more)));
      ASSERT_TRUE(worker->wait_for(base + num_choices));
      if (phase.num_tokens < 0) {
        TokenEvent reservation;
        reservation.kv_transfer.emplace();
        worker->emit(base, std::move(reservation));
      }
      for (int i = 0; i < phase.num_tokens; ++i) worker->emit(base, tokens_event(byte_tokens("x")));
      if (phase.stream && phase.num_tokens != 0) {
        ASSERT_TRUE(socket.receive_until("data: "));
      } else {
        std::this_thread::sleep_for(milliseconds(20));
      }
    }
    const int64_t left_us = clock.now_us();
    for (size_t i = base; i < base + num_choices; ++i) {
      const int64_t cancelled_us = worker->wait_for_cancel(i);
      ASSERT_NE(cancelled_us, 0);
      EXPECT_LT(cancelled_us - left_us, 100'000);
    }
    EXPECT_TRUE(eventually([this] { return num_requests() == 0; }));
    worker->emit(base, tokens_event(byte_tokens("x"), 3, FinishReason::kLength));  // it was on its way
  }
  EXPECT_TRUE(eventually([this] { return loop.run([this] { return server->num_connections(); }) == 0; }));
}

TEST_F(FrontendLifeTest, DoesNotSubmitForAClientThatLeftDuringTextWork) {
  start();
  const std::string prompt(4 << 20, 'x');  // long enough that the text thread is still at it
  {
    RawSocket socket(port);
    socket.send(completion_text("", "\"" + prompt + "\""));
    ASSERT_TRUE(eventually([this] { return num_requests() == 1; }));
  }
  EXPECT_TRUE(eventually([this] { return num_requests() == 0; }, milliseconds(60'000)));
  EXPECT_EQ(worker->num_requests(), 0U);
}

TEST_F(FrontendLifeTest, CutsASlowReaderAndCancelsItsRequest) {
  start();
  RawSocket slow(port, /*receive_buffer_bytes=*/4096);
  RawSocket quick(port);
  slow.send(completion_text(R"("stream":true,"return_token_ids":true)"));
  ASSERT_TRUE(worker->wait_for(1));
  quick.send(completion_text(R"("stream":true)"));
  ASSERT_TRUE(worker->wait_for(2));
  const std::vector<TokenId> many(200, byte_token("x"));
  for (int i = 0; i < 3'000 && !worker->is_cancelled(0); ++i) worker->emit(0, tokens_event(many));
  EXPECT_TRUE(worker->wait_for_cancel(0));
  worker->emit(1, tokens_event(byte_tokens("fine"), 3, FinishReason::kLength));
  EXPECT_EQ(joined_text(parse_events(quick.read_response().body)), "fine");
  EXPECT_EQ(num_requests(), 0);
}

TEST_F(FrontendLifeTest, KeepsToTheTimeThatARouterHasLeft) {
  FrontendOptions options;
  options.request_timeout_s = 60;
  start(std::move(options));
  const auto send = [this](const std::string& milliseconds_left) {
    const std::string body = R"({"model":"demo","prompt":"x"})";
    return post_text("/v1/completions", body, "X-Request-Timeout-Ms: " + milliseconds_left + "\r\n");
  };
  RawSocket shorter(port), longer(port), wrong(port);
  shorter.send(send("2500"));
  ASSERT_TRUE(worker->wait_for(1));
  EXPECT_NEAR(static_cast<double>(worker->request(0).deadline_us - clock.now_us()) * 1e-6, 2.5, 0.5);
  longer.send(send("99999999999999"));
  ASSERT_TRUE(worker->wait_for(2));
  EXPECT_NEAR(static_cast<double>(worker->request(1).deadline_us - clock.now_us()) * 1e-6, 60, 0.5);
  for (const char* value : {"0", "-5", "1.5", "soon", ""}) EXPECT_EQ(wrong.exchange(send(value)).status, 400) << value;
}

// ---- Life of the server ----

TEST_F(FrontendLifeTest, SaysThatItIsLoadingAndThatItDied) {
  FrontendOptions options;
  Health health{false, "loading", 0.25};
  options.health = [&health] { return health; };
  worker = std::make_unique<MockWorker>();
  start_closed(std::move(options));
  RawSocket socket(port);
  const RawResponse loading = socket.exchange(get_text("/health"));
  EXPECT_EQ(loading.status, 503);
  EXPECT_EQ(loading.body, R"({"status":"loading","progress":0.25})");
  for (const std::string& request :
       {get_text("/v1/models"), get_text("/v1/models/demo"), get_text("/tandem/v1/text_bundle"), completion_text(),
        chat_text(), post_text("/tokenize", "{}"), post_text("/detokenize", "{}")}) {
    const RawResponse response = socket.exchange(request);
    EXPECT_EQ(response.status, 503) << request;
    EXPECT_EQ(parse(response.body)["error"]["code"], "loading");
    EXPECT_TRUE(response.headers.contains("retry-after"));
  }
  loop.run([&] {
    health = {true, "ok", std::nullopt};
    frontend->open(demo_text(), *worker);
  });
  EXPECT_EQ(socket.exchange(get_text("/health")).status, 200);
  EXPECT_EQ(socket.exchange(get_text("/ping")).body, R"({"status":"ok"})");

  socket.send(completion_text());
  ASSERT_TRUE(worker->wait_for(1));
  loop.run([&] {
    Error died = make_error(ErrorKind::kUnavailable, "the engine has stopped");
    died.code = "engine_dead";
    frontend->close(std::move(died));
  });
  const RawResponse response = socket.read_response();
  EXPECT_EQ(response.status, 503);
  EXPECT_EQ(parse(response.body)["error"]["code"], "engine_dead");
  EXPECT_EQ(socket.exchange(chat_text()).status, 503);
}

TEST_F(FrontendLifeTest, SurvivesAWorkerThatOutlivesIt) {
  start();
  RawSocket socket(port);
  socket.send(completion_text(R"("stream":true)"));
  ASSERT_TRUE(worker->wait_for(1));
  worker->emit(0, tokens_event(byte_tokens("x")));
  ASSERT_TRUE(socket.receive_until("\"x\""));
  loop.run([this] { frontend->close(make_error(ErrorKind::kUnavailable, "stopping")); });
  ASSERT_TRUE(socket.receive_until("[DONE]"));
  loop.run([this] {
    server.reset();
    frontend.reset();
  });
  worker->emit(0, tokens_event(byte_tokens("y")));
}

TEST_F(FrontendLifeTest, AsksForAKeyOnEveryRouteButFour) {
  FrontendOptions options;
  options.api_keys = {"first-key", "second-key"};
  start(std::move(options));
  const std::vector<std::string> open_routes = {"/health", "/ping", "/metrics", "/version"};
  RawSocket socket(port);
  const auto ask = [&](const HttpRoute& route, const std::string& headers) {
    std::string path = route.path;
    if (path.ends_with('*')) path.replace(path.size() - 1, 1, "demo");
    return socket.exchange(route.method == "GET" ? get_text(path, headers) : post_text(path, "{}", headers));
  };
  size_t num_routes = 0;
  for (const HttpRoute& route : loop.run([this] { return server->routes(); })) {
    ++num_routes;
    const bool is_open = std::find(open_routes.begin(), open_routes.end(), route.path) != open_routes.end();
    // A refused body is not read, so the connection ends with it.
    RawSocket fresh(port);
    const RawResponse without =
        fresh.exchange(route.method == "GET" ? get_text(route.path == "/v1/models/*" ? "/v1/models/demo" : route.path)
                                             : post_text(route.path, "{}"));
    EXPECT_EQ(without.status == 401, !is_open) << route.path;
    if (!is_open) {
      EXPECT_EQ(without.headers.at("www-authenticate"), "Bearer");
      EXPECT_TRUE(parse(without.body)["error"]["code"].is_null());
    }
    for (const char* key : {"first-key", "second-key"}) {
      EXPECT_NE(ask(route, fmt::format("Authorization: Bearer {}\r\n", key)).status, 401) << route.path;
    }
  }
  EXPECT_EQ(num_routes, 13U);
  const auto status = [&](const std::string& headers) {
    return socket.exchange(get_text("/v1/models", headers)).status;
  };
  EXPECT_EQ(status("authorization: bearer first-key\r\n"), 200);
  for (const char* bad :
       {"Authorization: Bearer wrong\r\n", "Authorization: Bearer  first-key\r\n",
        "Authorization: Bearer first-key2\r\n", "Authorization: Bearer\r\n", "Authorization: Basic first-key\r\n",
        "Authorization: first-key\r\n", "X-Api-Key: first-key\r\n", "Authorization: Bearer first-ke\r\n"}) {
    EXPECT_EQ(status(bad), 401) << bad;
  }
  EXPECT_EQ(status("Authorization: Bearer wrong\r\nAuthorization: Bearer first-key\r\n"), 400);
  EXPECT_EQ(socket.exchange(get_text("/v1/models?api_key=first-key")).status, 401);
  EXPECT_EQ(parse(socket.exchange(get_text("/v1/models", "Authorization: Bearer wrong\r\n")).body)["error"]["code"],
            "invalid_api_key");
}

}  // namespace
}  // namespace tandem::api
