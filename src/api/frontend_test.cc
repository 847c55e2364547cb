#include "src/api/frontend.h"

#include <random>

#include "src/api/api_error.h"
#include "src/api/frontend_fixture.h"

namespace tandem::api {
namespace {

using engine::FinishReason;
using engine::TokenEvent;

constexpr TokenId kEos = 1;

TokenEvent stop_event(const std::vector<TokenId>& tokens, TokenId stop_token) {
  TokenEvent event = tokens_event(tokens, 3, FinishReason::kStop);
  event.stop_token = stop_token;
  return event;
}

TokenEvent error_event(ErrorKind kind, const std::string& message) {
  TokenEvent event;
  event.error = make_error(kind, "{}", message);
  return event;
}

TEST_F(FrontendTest, AnswersACompletion) {
  start();
  RawSocket socket(port);
  socket.send(post_text("/v1/completions",
                        R"({"model":"org/alias","prompt":"In the beginning","max_tokens":5,"seed":7,"cache_salt":"s"})",
                        "X-Request-Id: abc\r\n"));
  ASSERT_TRUE(worker->wait_for(1));
  const engine::TokenRequest request = worker->request(0);
  EXPECT_EQ(request.external_id, "abc");
  std::vector<TokenId> prompt = ids("In the beginning");
  prompt.insert(prompt.begin(), 0);  // the tokenizer adds BOS
  EXPECT_EQ(request.prompt, prompt);
  EXPECT_EQ(request.sampling.max_tokens, 5);
  EXPECT_EQ(request.sampling.seed, 7U);
  EXPECT_EQ(request.sampling.temperature, 0.3);  // of generation_config.json
  EXPECT_EQ(request.cache_salt, "s");
  EXPECT_NEAR(static_cast<double>(request.deadline_us - clock.now_us()) * 1e-6, 600, 5);
  EXPECT_EQ(num_requests(), 1);

  std::vector<TokenId> answer = ids(" God created");
  TokenEvent first = tokens_event({answer[0]}, 4);
  first.usage.cached_tokens = 2;
  worker->emit(0, first);
  answer.push_back(kEos);
  TokenEvent last = stop_event({answer.begin() + 1, answer.end()}, kEos);
  last.usage = {4, 2};
  worker->emit(0, last);
  const RawResponse response = socket.read_response();
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.headers.at("content-type"), "application/json");
  EXPECT_EQ(response.headers.at("x-request-id"), "abc");
  Json json = parse(response.body);
  EXPECT_NEAR(json["created"].get<double>(), static_cast<double>(unix_time_s()), 5);
  json.erase("created");
  const size_t n = answer.size();
  EXPECT_EQ(json.dump(),
            fmt::format(R"({{"id":"cmpl-abc","object":"text_completion","model":"org/alias","choices":[{{"index":0,)"
                        R"("text":" God created","logprobs":null,"finish_reason":"stop","stop_reason":null}}],)"
                        R"("usage":{{"prompt_tokens":4,"completion_tokens":{},"total_tokens":{},)"
                        R"("prompt_tokens_details":{{"cached_tokens":2}}}}}})",
                        n, n + 4));
  EXPECT_EQ(num_requests(), 0);
}

TEST_F(FrontendTest, StreamsACompletion) {
  start();
  RawSocket socket(port);
  socket.send(completion_text(R"("stream":true,"stream_options":{"include_usage":true})"));
  ASSERT_TRUE(worker->wait_for(1));
  for (const TokenId token : ids("Jesus wept")) worker->emit(0, tokens_event({token}));
  worker->emit(0, tokens_event(ids("."), 3, FinishReason::kLength));
  const RawResponse response = socket.read_response();
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.headers.at("content-type"), "text/event-stream; charset=utf-8");
  const std::vector<Json> events = parse_events(response.body);
  EXPECT_EQ(joined_text(events), "Jesus wept.");
  for (const Json& event : events) {
    EXPECT_EQ(event["id"], events[0]["id"]);
    EXPECT_EQ(event["created"], events[0]["created"]);
    EXPECT_EQ(event["object"], "text_completion");
    EXPECT_EQ(event.contains("usage"), &event == &events.back());
  }
  const Json& last = events[events.size() - 2]["choices"][0];
  EXPECT_EQ(last["finish_reason"], "length");
  EXPECT_TRUE(events[0]["choices"][0]["finish_reason"].is_null());
  EXPECT_EQ(events.back()["choices"].size(), 0U);
  EXPECT_EQ(events.back()["usage"]["prompt_tokens"], 3);
  EXPECT_EQ(events.back()["usage"]["completion_tokens"], events.size() - 1);
}

TEST_F(FrontendTest, StreamsAChat) {
  start();
  RawSocket socket(port);
  socket.send(chat_text(R"("stream":true,"stream_options":{"continuous_usage_stats":true},"return_token_ids":true)"));
  ASSERT_TRUE(worker->wait_for(1));
  std::vector<TokenId> prompt = {0, 3};
  const std::vector<TokenId> hi = ids("hi");
  prompt.insert(prompt.end(), hi.begin(), hi.end());
  prompt.push_back(4);
  EXPECT_EQ(worker->request(0).prompt, prompt);
  EXPECT_EQ(worker->request(0).sampling.max_tokens, 200 - static_cast<int64_t>(prompt.size()));
  const TokenId letter = byte_token("x");
  worker->emit(0, tokens_event({letter}, 4));
  worker->emit(0, stop_event({letter, kEos}, kEos));
  const std::vector<Json> events = parse_events(socket.read_response().body);
  ASSERT_EQ(events.size(), 3U);
  EXPECT_EQ(events[0]["object"], "chat.completion.chunk");
  EXPECT_EQ(events[0]["choices"][0]["delta"].dump(), R"({"role":"assistant","content":""})");
  EXPECT_EQ(events[0]["prompt_token_ids"], Json(prompt));
  EXPECT_EQ(events[1]["choices"][0]["delta"].dump(), R"({"content":"x"})");
  EXPECT_EQ(events[1]["choices"][0]["token_ids"], Json({letter}));
  EXPECT_EQ(events[1]["usage"]["completion_tokens"], 1);
  EXPECT_EQ(events[2]["choices"][0]["delta"].dump(), R"({"content":"x"})");
  EXPECT_EQ(events[2]["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(events[2]["choices"][0]["token_ids"], Json({letter, kEos}));
  EXPECT_EQ(events[2]["usage"]["completion_tokens"], 3);
}

TEST_F(FrontendTest, AnswersAChat) {
  start();
  RawSocket socket(port);
  socket.send(chat_text(R"("return_token_ids":true)"));
  ASSERT_TRUE(worker->wait_for(1));
  worker->emit(0, tokens_event(byte_tokens("yes"), 4, FinishReason::kLength));
  const Json json = parse(socket.read_response().body);
  EXPECT_TRUE(json["id"].get<std::string>().starts_with("chatcmpl-"));
  EXPECT_EQ(json["object"], "chat.completion");
  EXPECT_EQ(json["choices"][0]["message"].dump(), R"({"role":"assistant","content":"yes"})");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(json["choices"][0]["token_ids"], Json(byte_tokens("yes")));
  EXPECT_EQ(json["prompt_token_ids"], Json(worker->request(0).prompt));
}

TEST_F(FrontendTest, NeverEmitsHalfACharacter) {
  start();
  RawSocket socket(port);
  socket.send(completion_text(R"("stream":true)"));
  ASSERT_TRUE(worker->wait_for(1));
  const std::string text = "aä😀z\xE2\x82";  // the last character is cut off
  for (const TokenId token : byte_tokens(text)) worker->emit(0, tokens_event({token}));
  worker->emit(0, tokens_event({}, 3, FinishReason::kLength));
  const std::string body = socket.read_response().body;
  const std::vector<Json> events = parse_events(body);
  EXPECT_EQ(joined_text(events), "aä😀z\xEF\xBF\xBD");
  size_t num_replacements = 0;
  for (size_t at = body.find("\xEF\xBF\xBD"); at != std::string::npos; at = body.find("\xEF\xBF\xBD", at + 1)) {
    ++num_replacements;
  }
  EXPECT_EQ(num_replacements, 1U);
}

// ---- How an answer ends ----

TEST_F(FrontendTest, FindsStopStringsHoweverTokensCutThem) {
  start();
  std::mt19937 random(11);
  const std::string text = "one two STOP three";
  for (int round = 0; round < 30; ++round) {
    const bool stream = round % 2 == 0;
    const bool include = round % 3 == 0;
    RawSocket socket(port);
    socket.send(completion_text(
        fmt::format(R"("stop":["zzz","STOP"],"stream":{},"include_stop_str_in_output":{})", stream, include)));
    ASSERT_TRUE(worker->wait_for(static_cast<size_t>(round) + 1));
    const size_t index = static_cast<size_t>(round);
    const std::vector<TokenId> tokens = byte_tokens(text);
    for (size_t i = 0; i < tokens.size();) {
      const size_t n = std::min<size_t>(1 + random() % 5, tokens.size() - i);
      worker->emit(index, tokens_event({tokens.begin() + static_cast<ptrdiff_t>(i),
                                        tokens.begin() + static_cast<ptrdiff_t>(i + n)}));
      i += n;
    }
    const std::string body = socket.read_response().body;
    EXPECT_TRUE(worker->wait_for_cancel(index));
    const std::string expected = include ? "one two STOP" : "one two ";
    if (stream) {
      const std::vector<Json> events = parse_events(body);
      EXPECT_EQ(joined_text(events), expected) << "seed 11, round " << round;
      EXPECT_EQ(events.back()["choices"][0]["finish_reason"], "stop");
      EXPECT_EQ(events.back()["choices"][0]["stop_reason"], "STOP");
    } else {
      const Json json = parse(body);
      EXPECT_EQ(json["choices"][0]["text"], expected) << "seed 11, round " << round;
      EXPECT_EQ(json["choices"][0]["stop_reason"], "STOP");
      EXPECT_EQ(json["usage"]["completion_tokens"], 12);  // up to the P
    }
  }
  EXPECT_EQ(num_requests(), 0);
}

TEST_F(FrontendTest, StopStringsWaitForMinTokens) {
  start();
  RawSocket socket(port);
  socket.send(completion_text(R"("stop":"b","min_tokens":3)"));
  ASSERT_TRUE(worker->wait_for(1));
  worker->emit(0, tokens_event(byte_tokens("abcab")));
  EXPECT_EQ(parse(socket.read_response().body)["choices"][0]["text"], "abca");
}

TEST_F(FrontendTest, NamesTheStopToken) {
  start();
  const TokenId letter = byte_token("x");
  const TokenId period = byte_token(".");
  struct Case {
    std::string fields;
    TokenId stop_token;
    std::string text;
    Json stop_reason;
  };
  const std::string stop_ids = fmt::format(R"("stop_token_ids":[{},{}])", period, kEos);
  const std::vector<Case> cases = {
      {R"("user":"u")", kEos, "x", nullptr},
      {stop_ids, period, "x", period},
      {stop_ids, kEos, "x", kEos},
      {stop_ids + R"(,"include_stop_str_in_output":true)", period, "x.", period},
      {R"("include_stop_str_in_output":true,"skip_special_tokens":false)", kEos, "x<|eos|>", nullptr},
  };
  RawSocket socket(port);
  for (size_t i = 0; i < cases.size(); ++i) {
    socket.send(completion_text(cases[i].fields));
    ASSERT_TRUE(worker->wait_for(i + 1));
    worker->emit(i, stop_event({letter, cases[i].stop_token}, cases[i].stop_token));
    const Json json = parse(socket.read_response().body);
    EXPECT_EQ(json["choices"][0]["text"], cases[i].text) << i;
    EXPECT_EQ(json["choices"][0]["stop_reason"], cases[i].stop_reason) << i;
    EXPECT_EQ(json["usage"]["completion_tokens"], 2);
    EXPECT_FALSE(worker->is_cancelled(i));
  }
}

// ---- Several choices, logprobs, ids ----

TEST_F(FrontendTest, FansOutPromptsAndChoices) {
  start();
  for (const bool stream : {false, true}) {
    const size_t base = worker->num_requests();
    RawSocket socket(port);
    socket.send(completion_text(fmt::format(R"("n":2,"seed":40,"stream":{},"stream_options":{})", stream,
                                            stream ? R"({"include_usage":true})" : "null"),
                                R"(["one","two words"])"));
    ASSERT_TRUE(worker->wait_for(base + 4));
    EXPECT_EQ(worker->request(base).prompt, worker->request(base + 1).prompt);
    EXPECT_NE(worker->request(base).prompt, worker->request(base + 2).prompt);
    EXPECT_EQ(worker->request(base + 3).sampling.seed, 41U);
    // In any order, interleaved.
    for (const size_t i : {3U, 1U, 0U, 2U}) worker->emit(base + i, tokens_event(byte_tokens(std::to_string(i)), 5));
    for (const size_t i : {2U, 0U, 3U, 1U}) {
      TokenEvent event = tokens_event(byte_tokens("."), 5, FinishReason::kLength);
      event.usage.cached_tokens = 1;
      worker->emit(base + i, std::move(event));
    }
    const std::string body = socket.read_response().body;
    Json usage;
    if (stream) {
      const std::vector<Json> events = parse_events(body);
      for (int i = 0; i < 4; ++i) EXPECT_EQ(joined_text(events, i), fmt::format("{}.", i));
      usage = events.back()["usage"];
    } else {
      const Json json = parse(body);
      ASSERT_EQ(json["choices"].size(), 4U);
      for (size_t i = 0; i < 4; ++i) {
        EXPECT_EQ(json["choices"][i]["index"], i);
        EXPECT_EQ(json["choices"][i]["text"], fmt::format("{}.", i));
      }
      usage = json["usage"];
    }
    EXPECT_EQ(usage.dump(), R"({"prompt_tokens":10,"completion_tokens":8,"total_tokens":18,)"
                            R"("prompt_tokens_details":{"cached_tokens":2}})");
  }
}

TEST_F(FrontendTest, ShowsLogprobsInBothShapes) {
  start();
  TokenEvent event = tokens_event(byte_tokens("ab"), 3, FinishReason::kLength);
  event.tokens[0].top_logprobs = {{byte_token("z"), -0.25F}, {byte_token("a"), -0.5F}};
  event.tokens[1].top_logprobs = {{byte_token("b"), -0.5F}, {byte_token("\xC3"), -INFINITY}};
  for (const bool stream : {false, true}) {
    const size_t base = worker->num_requests();
    RawSocket socket(port);
    socket.send(completion_text(fmt::format(R"("logprobs":2,"stream":{})", stream)));
    ASSERT_TRUE(worker->wait_for(base + 1));
    EXPECT_EQ(worker->request(base).sampling.num_logprobs, 2);
    worker->emit(base, event);
    std::string body = socket.read_response().body;
    const Json completion = stream ? parse_events(body).at(0) : parse(body);
    EXPECT_EQ(completion["choices"][0]["logprobs"].dump(),
              "{\"text_offset\":[0,1],\"token_logprobs\":[-0.5,-0.5],\"tokens\":[\"a\",\"b\"],\"top_logprobs\":["
              "{\"a\":-0.5,\"z\":-0.25},{\"b\":-0.5,\"\xEF\xBF\xBD\":-9999.0}]}");

    socket.send(chat_text(fmt::format(R"("logprobs":true,"top_logprobs":2,"stream":{})", stream)));
    ASSERT_TRUE(worker->wait_for(base + 2));
    worker->emit(base + 1, event);
    body = socket.read_response().body;
    const Json chat = stream ? parse_events(body).at(1) : parse(body);
    EXPECT_EQ(chat["choices"][0]["logprobs"]["content"].size(), 2U);
    EXPECT_EQ(chat["choices"][0]["logprobs"]["content"][1].dump(),
              "{\"token\":\"b\",\"logprob\":-0.5,\"bytes\":[98],\"top_logprobs\":[{\"token\":\"b\",\"logprob\":-0.5,"
              "\"bytes\":[98]},{\"token\":\"\xEF\xBF\xBD\",\"logprob\":-9999.0,\"bytes\":[195]}]}");
  }
}

TEST_F(FrontendTest, ServesTokensOnly) {
  start();
  RawSocket socket(port);
  socket.send(post_text("/v1/completions",
                        R"({"prompt":[7,8],"detokenize":false,"return_token_ids":true,"logprobs":0,"stream":true})"));
  ASSERT_TRUE(worker->wait_for(1));
  EXPECT_EQ(worker->request(0).prompt, (std::vector<TokenId>{7, 8}));
  worker->emit(0, tokens_event({100}, 2));
  worker->emit(0, stop_event({101, kEos}, kEos));
  const std::vector<Json> events = parse_events(socket.read_response().body);
  ASSERT_EQ(events.size(), 2U);
  EXPECT_EQ(
      events[0]["choices"][0].dump(),
      R"({"index":0,"text":"","logprobs":{"text_offset":[0],"token_logprobs":[-0.5],"tokens":["token_id:100"],)"
      R"("top_logprobs":[{"token_id:100":-0.5}]},"finish_reason":null,"token_ids":[100]})");
  EXPECT_EQ(events[1]["choices"][0]["token_ids"].dump(), "[101,1]");
}

TEST_F(FrontendTest, CarriesKvTransferParameters) {
  start();
  TokenEvent reservation;
  reservation.kv_transfer.emplace().do_remote_decode = true;
  reservation.kv_transfer->remote_host = "10.0.0.1";
  RawSocket socket(port);
  // A reservation is the first chunk, before any token.
  socket.send(completion_text(R"("stream":true,"kv_transfer_params":{"do_remote_prefill":true})"));
  ASSERT_TRUE(worker->wait_for(1));
  ASSERT_TRUE(worker->request(0).kv_transfer);
  EXPECT_TRUE(worker->request(0).kv_transfer->do_remote_prefill);
  worker->emit(0, reservation);
  ASSERT_TRUE(socket.receive_until("10.0.0.1"));
  worker->emit(0, tokens_event(byte_tokens("x"), 3, FinishReason::kLength));
  const std::vector<Json> events = parse_events(socket.read_response().body);
  ASSERT_EQ(events.size(), 2U);
  EXPECT_EQ(events[0]["choices"].size(), 0U);
  EXPECT_EQ(events[0]["kv_transfer_params"]["do_remote_decode"], true);
  EXPECT_FALSE(events[1].contains("kv_transfer_params"));

  // A publication comes with the last chunk, or in the whole response.
  for (const bool stream : {true, false}) {
    const size_t index = worker->num_requests();
    socket.send(
        completion_text(fmt::format(R"("stream":{},"kv_transfer_params":{{"do_remote_decode":true}})", stream)));
    ASSERT_TRUE(worker->wait_for(index + 1));
    TokenEvent last = tokens_event(byte_tokens("x"), 3, FinishReason::kLength);
    last.kv_transfer.emplace().do_remote_prefill = true;
    last.kv_transfer->remote_host = "10.0.0.2";
    worker->emit(index, std::move(last));
    const std::string body = socket.read_response().body;
    const Json json = stream ? parse_events(body).at(0) : parse(body);
    EXPECT_EQ(json["kv_transfer_params"]["remote_host"], "10.0.0.2");
    EXPECT_EQ(json["choices"].size(), 1U);
  }

  // The decode leg of a pull uses the prefill side's tokens, not the prompt.
  socket.send(completion_text(R"("kv_transfer_params":{"do_remote_prefill":true,"prompt_token_ids":[5,6,7]})"));
  ASSERT_TRUE(worker->wait_for(4));
  EXPECT_EQ(worker->request(3).prompt, (std::vector<TokenId>{5, 6, 7}));
  worker->emit(3, tokens_event({}, 3, FinishReason::kAbort));
  EXPECT_EQ(parse(socket.read_response().body)["choices"][0]["finish_reason"], "abort");
}

// ---- Faults ----

TEST_F(FrontendTest, GivesErrorsTheirStatusBeforeTheFirstByte) {
  start();
  struct Case {
    ErrorKind kind;
    int status;
    const char* type;
    const char* code;
  };
  const std::vector<Case> cases = {
      {ErrorKind::kInvalidArgument, 400, "invalid_request_error", nullptr},
      {ErrorKind::kResourceExhausted, 429, "rate_limit_error", "queue_full"},
      {ErrorKind::kUnavailable, 503, "service_unavailable_error", "server_is_overloaded"},
      {ErrorKind::kDeadlineExceeded, 504, "server_error", "upstream_timeout"},
      {ErrorKind::kInternal, 500, "server_error", "internal_error"},
      {ErrorKind::kDataLoss, 500, "server_error", "internal_error"},
      {ErrorKind::kUnsupported, 501, "invalid_request_error", nullptr},
  };
  RawSocket socket(port);
  for (const Case& c : cases) {
    for (const bool stream : {false, true}) {
      const size_t index = worker->num_requests();
      socket.send(completion_text(fmt::format(R"("stream":{})", stream)));
      ASSERT_TRUE(worker->wait_for(index + 1));
      worker->emit(index, error_event(c.kind, "it \"failed\""));
      const RawResponse response = socket.read_response();
      EXPECT_EQ(response.status, c.status);
      EXPECT_EQ(response.headers.contains("retry-after"), c.status == 429 || c.status == 503);
      EXPECT_TRUE(response.headers.contains("x-request-id"));
      const Json error = parse(response.body)["error"];
      EXPECT_EQ(error["message"], "it \"failed\"");
      EXPECT_EQ(error["type"], c.type);
      EXPECT_EQ(error["code"], c.code == nullptr ? Json() : Json(c.code));
      // What a client of our own kind makes of it.
      EXPECT_EQ(http_status(error_from_response(response.status, response.body)), c.status);
    }
  }
  EXPECT_EQ(num_requests(), 0);
}

TEST_F(FrontendTest, SendsErrorsAsEventsAfterTheFirstByte) {
  start();
  RawSocket socket(port);
  socket.send(chat_text(R"("stream":true,"n":3)"));
  ASSERT_TRUE(worker->wait_for(3));
  worker->emit(1, tokens_event(byte_tokens("x")));
  ASSERT_TRUE(socket.receive_until("\"x\""));
  worker->emit(2, error_event(ErrorKind::kUnavailable, "worker lost"));
  worker->emit(0, tokens_event(byte_tokens("y")));  // too late
  const RawResponse response = socket.read_response();
  EXPECT_EQ(response.status, 200);
  const std::vector<Json> events = parse_events(response.body);
  EXPECT_EQ(events.back()["error"]["message"], "worker lost");
  EXPECT_EQ(events.back()["error"]["type"], "service_unavailable_error");
  EXPECT_EQ(response.body.find("finish_reason\":\""), std::string::npos);
  EXPECT_EQ(response.body.find("\"y\""), std::string::npos);
  EXPECT_TRUE(worker->wait_for_cancel(0));
  EXPECT_TRUE(worker->wait_for_cancel(1));
  EXPECT_EQ(num_requests(), 0);
}

TEST_F(FrontendTest, EndsARequestThatItsWorkerForgets) {
  FrontendOptions options;
  options.request_timeout_s = 0.1;
  start(std::move(options));
  RawSocket socket(port);
  const RawResponse response = socket.exchange(completion_text());
  EXPECT_EQ(response.status, 504);
  EXPECT_TRUE(worker->is_cancelled(0));
}

TEST_F(FrontendTest, RefusesMoreThanItsBound) {
  FrontendOptions options;
  options.max_concurrent_requests = 2;
  start(std::move(options));
  RawSocket first(port), second(port), third(port);
  first.send(completion_text());
  second.send(completion_text());
  ASSERT_TRUE(worker->wait_for(2));
  const RawResponse response = third.exchange(completion_text());
  EXPECT_EQ(response.status, 429);
  EXPECT_EQ(response.headers.at("retry-after"), "1");
  EXPECT_EQ(parse(response.body)["error"]["code"], "queue_full");
  EXPECT_EQ(parse(third.exchange(get_text("/load")).body)["server_load"], 2);
  worker->emit(0, tokens_event({}, 3, FinishReason::kLength));
  EXPECT_EQ(first.read_response().status, 200);
  third.send(completion_text());
  EXPECT_TRUE(worker->wait_for(3));
}

// ---- The small routes ----

TEST_F(FrontendTest, DescribesItsModels) {
  start();
  RawSocket socket(port);
  const Json list = parse(socket.exchange(get_text("/v1/models")).body);
  EXPECT_EQ(list["object"], "list");
  ASSERT_EQ(list["data"].size(), 2U);
  EXPECT_EQ(list["data"][0]["id"], "demo");
  EXPECT_EQ(list["data"][0]["max_model_len"], 200);
  EXPECT_EQ(list["data"][0]["root"], "models/demo");
  EXPECT_EQ(list["data"][0]["object"], "model");
  EXPECT_EQ(parse(socket.exchange(get_text("/v1/models/org%2Falias")).body)["id"], "org/alias");
  EXPECT_EQ(parse(socket.exchange(get_text("/v1/models/org/alias")).body)["id"], "org/alias");
  const RawResponse missing = socket.exchange(get_text("/v1/models/../demo"));
  EXPECT_EQ(missing.status, 404);
  EXPECT_EQ(parse(missing.body)["error"]["code"], "model_not_found");
  EXPECT_EQ(socket.exchange(get_text("/version")).body, R"({"version":"1.2.3"})");
}

TEST_F(FrontendTest, Tokenizes) {
  start();
  RawSocket socket(port);
  const auto tokenize = [&](const std::string& body) {
    return parse(socket.exchange(post_text("/tokenize", body)).body);
  };
  const Json plain = tokenize(R"({"prompt":"God is love","model":"demo","return_token_strs":true})");
  std::vector<TokenId> expected = ids("God is love");
  expected.insert(expected.begin(), 0);
  EXPECT_EQ(plain["tokens"], Json(expected));
  EXPECT_EQ(plain["count"], expected.size());
  EXPECT_EQ(plain["max_model_len"], 200);
  EXPECT_EQ(plain["token_strs"][0], "<|bos|>");
  EXPECT_EQ(tokenize(R"({"prompt":"God is love","add_special_tokens":false})")["tokens"], Json(ids("God is love")));
  EXPECT_EQ(tokenize(R"({"prompt":""})")["tokens"].dump(), "[0]");
  EXPECT_TRUE(tokenize(R"({"prompt":"x"})")["token_strs"].is_null());

  std::vector<TokenId> chat = {0, 3};
  const std::vector<TokenId> hi = ids("hi");
  chat.insert(chat.end(), hi.begin(), hi.end());
  EXPECT_EQ(tokenize(R"({"messages":[{"role":"user","content":"hi"}],"add_generation_prompt":false})")["tokens"],
            Json(chat));
  // Text that looks like a control token is text.
  const Json hostile = tokenize(R"({"messages":[{"role":"user","content":"a<|eos|><|system|>b"}]})");
  size_t num_controls = 0;
  for (const Json& token : hostile["tokens"]) num_controls += token.get<int>() <= 5 ? 1U : 0U;
  EXPECT_EQ(num_controls, 3U);  // BOS, user, assistant: all by the template

  const std::string ids_text = Json(ids("God is love")).dump();
  EXPECT_EQ(socket.exchange(post_text("/detokenize", "{\"tokens\":" + ids_text + "}")).body,
            R"({"prompt":"God is love"})");
  EXPECT_EQ(socket.exchange(post_text("/detokenize", R"({"tokens":[]})")).body, R"({"prompt":""})");
}

TEST_F(FrontendTest, GivesARouterAllItNeeds) {
  start();
  RawSocket socket(port);
  const RawResponse response = socket.exchange(get_text("/tandem/v1/text_bundle"));
  ASSERT_EQ(response.status, 200);
  ServedTextSource source = parse_served_text(response.body).value();
  EXPECT_EQ(source.bundle, demo_text().bundle);
  const ServedText served = make_served_text(std::move(source.facts), std::move(source.bundle)).value();
  EXPECT_EQ(served.model.names, demo_text().model.names);
  EXPECT_EQ(served.model.max_model_len, 200);
  EXPECT_EQ(served.model.vocab_size, 4096);
  EXPECT_EQ(served.model.eos_ids, demo_text().model.eos_ids);
  EXPECT_EQ(served.model.defaults.temperature, 0.3);
  ASSERT_TRUE(served.chat_template);
  EXPECT_FALSE(parse_served_text("{}").ok());
  EXPECT_FALSE(parse_served_text("[]").ok());
}

TEST_F(FrontendTest, CountsRequests) {
  start();
  RawSocket socket(port);
  socket.send(completion_text(R"("max_tokens":9)"));
  ASSERT_TRUE(worker->wait_for(1));
  worker->emit(0, tokens_event(byte_tokens("a")));
  worker->emit(0, tokens_event(byte_tokens("bc"), 3, FinishReason::kLength));
  ASSERT_EQ(socket.read_response().status, 200);
  socket.send(completion_text());
  ASSERT_TRUE(worker->wait_for(2));
  socket.close();
  ASSERT_TRUE(worker->wait_for_cancel(1));
  EXPECT_EQ(RawSocket(port).exchange(post_text("/v1/completions", "{")).status, 400);
  ASSERT_TRUE(eventually([this] { return num_requests() == 0; }));
  ASSERT_TRUE(eventually([this] { return loop.run([this] { return server->num_connections(); }) == 0; }));
  const std::string text = metrics_text();
  const std::string labels = R"({model_name="demo",engine="0")";
  for (const std::string& line : {
           "vllm:request_success_total" + labels + ",finished_reason=\"length\"} 1\n",
           "vllm:request_success_total" + labels + ",finished_reason=\"abort\"} 1\n",
           "vllm:request_success_total" + labels + ",finished_reason=\"error\"} 0\n",
           "vllm:time_to_first_token_seconds_count" + labels + "} 1\n",
           "vllm:inter_token_latency_seconds_count" + labels + "} 2\n",
           "vllm:request_time_per_output_token_seconds_count" + labels + "} 1\n",
           "vllm:e2e_request_latency_seconds_count" + labels + "} 2\n",
           "vllm:request_generation_tokens_sum" + labels + "} 3\n",
           "vllm:request_prompt_tokens_bucket" + labels + ",le=\"200.0\"} 2\n",
           "vllm:request_params_max_tokens_sum" + labels + "} 25\n",
           "vllm:request_params_n_bucket" + labels + ",le=\"1.0\"} 2\n",
           "vllm:request_max_num_generation_tokens_count" + labels + "} 1\n",
           std::string("http_requests_total{handler=\"/v1/completions\",method=\"POST\",status=\"2xx\"} 1\n"),
           std::string("http_requests_total{handler=\"/v1/completions\",method=\"POST\",status=\"4xx\"} 2\n"),
           std::string("http_request_duration_seconds_count{handler=\"/v1/completions\",method=\"POST\"} 3\n"),
       }) {
    EXPECT_NE(text.find(line), std::string::npos) << line;
  }
  EXPECT_EQ(text.find("handler=\"/metrics\""), std::string::npos);
}

TEST_F(FrontendTest, AnswersPipelinedRequestsInOrder) {
  start({}, [](const engine::TokenRequest& request, const engine::EventSink& sink) {
    sink(tokens_event({request.prompt.back()}, 1, FinishReason::kLength));
  });
  RawSocket socket(port);
  std::string requests;
  for (int i = 0; i < 20; ++i) requests += completion_text(R"("return_token_ids":true)", fmt::format("[{}]", 100 + i));
  socket.send(requests);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(parse(socket.read_response().body)["choices"][0]["token_ids"][0], 100 + i);
  }
}

TEST_F(FrontendTest, ServesManyClientsAtOnce) {
  start({}, [](const engine::TokenRequest& request, const engine::EventSink& sink) {
    for (int i = 0; i < 20; ++i) {
      sink(tokens_event({request.prompt.back()}, 1,
                        i == 19 ? std::optional<FinishReason>(FinishReason::kLength) : std::nullopt));
    }
  });
  std::vector<std::thread> clients;
  std::atomic<int> num_right{0};
  for (int client = 0; client < 8; ++client) {
    clients.emplace_back([&, client] {
      RawSocket socket(port);
      for (int i = 0; i < 25; ++i) {
        const TokenId token = 100 + client * 25 + i;
        const bool stream = i % 2 == 0;
        socket.send(
            completion_text(fmt::format(R"("stream":{},"return_token_ids":true)", stream), fmt::format("[{}]", token)));
        const std::string body = socket.read_response().body;
        std::vector<TokenId> seen;
        for (const Json& json : stream ? parse_events(body) : std::vector<Json>{parse(body)}) {
          for (const Json& id : json["choices"][0]["token_ids"]) seen.push_back(id.get<TokenId>());
        }
        if (seen == std::vector<TokenId>(20, token)) ++num_right;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(num_right, 200);
  EXPECT_EQ(num_requests(), 0);
}

TEST_F(FrontendTest, TakesABodyInChunksOfOneByte) {
  start({}, [](const engine::TokenRequest&, const engine::EventSink& sink) {
    sink(tokens_event({}, 1, FinishReason::kLength));
  });
  RawSocket socket(port);
  std::string request =
      "POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nTransfer-Encoding: "
      "chunked\r\n\r\n";
  for (const char c : std::string(R"({"model":"demo","prompt":"a"})")) request += fmt::format("1\r\n{}\r\n", c);
  EXPECT_EQ(socket.exchange(request + "0\r\n\r\n").status, 200);
}

TEST_F(FrontendTest, SaysThatAModelHasNoChatTemplate) {
  ServedText plain = demo_text();
  plain.chat_template = nullptr;
  start();
  loop.run([&] { frontend->open(plain, *worker); });
  RawSocket socket(port);
  const RawResponse response = socket.exchange(chat_text());
  EXPECT_EQ(response.status, 400);
  EXPECT_EQ(parse(response.body)["error"]["param"], "messages");
}

}  // namespace
}  // namespace tandem::api
