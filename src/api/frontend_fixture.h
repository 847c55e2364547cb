// For tests: the whole front end on a socket, with the demo model's text and a mock worker.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "src/api/frontend.h"
#include "src/api/mock_worker.h"
#include "src/api/sse.h"
#include "src/api/test_support.h"

namespace tandem::api {

// Made once: compiling a tokenizer takes a while under a sanitizer.
inline const ServedText& demo_text() {
  static const ServedText served = [] {
    text::TextBundle bundle = text::TextBundle::load(TANDEM_SOURCE_DIR "/models/demo").value();
    ServedModelFacts facts;
    facts.names = {"demo", "org/alias"};
    facts.root = "models/demo";
    facts.max_model_len = 200;
    facts.vocab_size = 4096;
    return make_served_text(std::move(facts), std::move(bundle)).value();
  }();
  return served;
}

class FrontendTest : public testing::Test {
 protected:
  FrontendTest() = default;
  ~FrontendTest() override { stop(); }

  void start(FrontendOptions options = {}, MockWorker::Answer answer = {}) {
    worker = std::make_unique<MockWorker>(std::move(answer));
    options.version = "1.2.3";
    options.policy.accepts_kv_transfer = true;
    start_closed(std::move(options));
    loop.run([this] { frontend->open(demo_text(), *worker); });
  }
  void start_closed(FrontendOptions options) {
    loop.run([&] {
      frontend = std::make_unique<Frontend>(loop.io, std::move(options), clock, registry);
      HttpServerOptions http = frontend->http_options();
      http.max_buffered_bytes = 64 << 10;
      http.send_buffer_bytes = 16 << 10;
      server = HttpServer::listen(loop.io, "127.0.0.1", 0, std::move(http)).value();
      frontend->add_routes(*server);
      server->start();
      port = server->port();
    });
  }
  void stop() {
    loop.run([this] {
      server.reset();
      frontend.reset();
    });
  }

  static std::vector<TokenId> ids(const std::string& text) {
    return demo_text().tokenizer->encode(text, /*add_special_tokens=*/false).value();
  }
  // The token of one byte.
  static TokenId byte_token(const std::string& byte) {
    for (TokenId id = 0; id < demo_text().tokenizer->vocab_size(); ++id) {
      if (demo_text().tokenizer->token_bytes(id) == byte) return id;
    }
    ADD_FAILURE() << "no token for a byte";
    return -1;
  }
  // One token per byte, so that texts can be cut anywhere.
  static std::vector<TokenId> byte_tokens(const std::string& text) {
    std::vector<TokenId> out;
    for (const char c : text) out.push_back(byte_token(std::string(1, c)));
    return out;
  }

  // Sends a completion with these further fields, ", "-separated JSON members.
  std::string completion_text(const std::string& fields = "", const std::string& prompt = "\"In the beginning\"") {
    return post_text("/v1/completions", fmt::format("{{\"model\":\"demo\",\"prompt\":{}{}{}}}", prompt,
                                                    fields.empty() ? "" : ",", fields));
  }
  std::string chat_text(const std::string& fields = "") {
    return post_text("/v1/chat/completions",
                     fmt::format("{{\"model\":\"demo\",\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}]{}{}}}",
                                 fields.empty() ? "" : ",", fields));
  }
  static Json parse(const std::string& text) {
    const Result<Json> json = parse_strict_json(text, "response");
    EXPECT_TRUE(json.ok()) << text;
    return json.ok() ? *json : Json();
  }
  // The events of a stream; checks that it ends with [DONE], which is left out.
  static std::vector<Json> parse_events(const std::string& body) {
    std::vector<std::string> data;
    SseParser parser;
    EXPECT_TRUE(parser.feed(body, [&](const SseEvent& event) { data.push_back(event.data); }).ok());
    EXPECT_TRUE(!data.empty() && data.back() == "[DONE]") << body;
    std::vector<Json> out;
    for (size_t i = 0; i + 1 < data.size(); ++i) out.push_back(parse(data[i]));
    return out;
  }
  // All of a stream's text of one choice.
  static std::string joined_text(const std::vector<Json>& events, int index = 0) {
    std::string text;
    for (const Json& event : events) {
      for (const Json& choice : event.value("choices", Json::array())) {
        if (choice["index"] != index) continue;
        text += choice.contains("text") ? choice["text"].get<std::string>()
                                        : choice["delta"].value("content", std::string());
      }
    }
    return text;
  }
  std::string metrics_text() { return RawSocket(port).exchange(get_text("/metrics")).body; }
  int64_t num_requests() {
    return loop.run([this] { return frontend->num_requests(); });
  }

  // In this order: the loop's thread ends before what it uses is destroyed.
  SteadyClock clock;
  Registry registry;
  std::unique_ptr<MockWorker> worker;
  LoopThread loop;
  std::unique_ptr<Frontend> frontend;
  std::unique_ptr<HttpServer> server;
  uint16_t port = 0;
};

}  // namespace tandem::api
