#include "src/router/completion_wire.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

namespace tandem::router {
namespace {

using nlohmann::json;

engine::TokenRequest sample_request() {
  engine::TokenRequest request;
  request.prompt = {1, 20, 300};
  request.sampling.max_tokens = 40;
  request.sampling.min_tokens = 7;
  request.sampling.temperature = 0.7;
  request.sampling.seed = 0xFFFFFFFFFFFFFFFEULL;
  request.sampling.logit_bias = {{5, 0.1f}, {6, -100.0f}};
  request.sampling.stop_token_ids = {9};
  request.sampling.num_logprobs = 2;
  request.cache_salt = "salt \"1\"";
  return request;
}

TEST(Body, CarriesEverySamplingParameter) {
  const json body = json::parse(decode_body(sample_request(), R"({"do_remote_prefill":true})"));
  EXPECT_EQ(body["prompt"], json({1, 20, 300}));
  EXPECT_EQ(body["max_tokens"], 40);
  EXPECT_EQ(body["min_tokens"], 7);
  EXPECT_EQ(body["temperature"], 0.7);
  EXPECT_EQ(body["seed"], -2);
  EXPECT_EQ(body["logit_bias"]["5"].get<float>(), 0.1f);
  EXPECT_EQ(body["stop_token_ids"], json({9}));
  EXPECT_EQ(body["logprobs"], 2);
  EXPECT_EQ(body["cache_salt"], "salt \"1\"");
  EXPECT_EQ(body["stream"], true);
  EXPECT_EQ(body["return_token_ids"], true);
  EXPECT_EQ(body["detokenize"], false);
  EXPECT_EQ(body["kv_transfer_params"]["do_remote_prefill"], true);
  EXPECT_FALSE(json::parse(decode_body(sample_request(), "")).contains("kv_transfer_params"));
}

TEST(Body, PrefillAsksForOneTokenSampledAlike) {
  const json decode = json::parse(decode_body(sample_request(), ""));
  const json prefill = json::parse(prefill_body(sample_request(), R"({"remote_port":5})"));
  EXPECT_EQ(prefill["max_tokens"], 1);
  EXPECT_EQ(prefill["min_tokens"], 1);
  EXPECT_EQ(prefill["stream"], false);
  EXPECT_FALSE(prefill.contains("stream_options"));
  EXPECT_EQ(prefill["kv_transfer_params"]["remote_port"], 5);
  for (const auto& [key, value] : decode.items()) {
    const bool differs = key == "max_tokens" || key == "min_tokens" || key == "stream" || key == "stream_options" ||
                         key == "return_token_ids";
    if (differs) continue;
    EXPECT_EQ(prefill[key], value) << key;
  }
}

std::string chunk(const json& choice, const json& usage = nullptr) {
  json out = {{"id", "cmpl-1"}, {"object", "text_completion"}, {"choices", json::array({choice})}};
  if (!usage.is_null()) out["usage"] = usage;
  return out.dump();
}

// The body is written by hand; whatever the parameters, a JSON reader must find exactly them and nothing else.
TEST(Body, IsWhatADocumentWouldBe) {
  const uint64_t seed = std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  const auto real = [&random] { return std::uniform_real_distribution<double>(-2, 2)(random); };
  for (int run = 0; run < 2'000; ++run) {
    engine::TokenRequest request;
    for (uint64_t n = 1 + random() % 5; n > 0; --n) request.prompt.push_back(static_cast<TokenId>(random() % 200'000));
    engine::SamplingParams& s = request.sampling;
    s.max_tokens = static_cast<int64_t>(random() % 1000) + 1;
    s.min_tokens = static_cast<int64_t>(random() % 3);
    s.temperature = random() % 2 == 0 ? 0 : real();
    s.top_k = static_cast<int64_t>(random() % 100);
    s.top_p = real();
    s.min_p = random() % 2 == 0 ? 0 : 1e-7;
    s.repetition_penalty = random() % 2 == 0 ? 1 : 1e6;
    s.presence_penalty = real();
    s.frequency_penalty = real();
    s.seed = random();
    s.ignore_eos = random() % 2 == 0;
    s.num_logprobs = static_cast<int64_t>(random() % 4) - 1;
    for (uint64_t n = random() % 3; n > 0; --n) s.stop_token_ids.push_back(static_cast<TokenId>(random() % 1000));
    for (uint64_t n = random() % 3; n > 0; --n)
      s.logit_bias.emplace_back(static_cast<TokenId>(n), static_cast<float>(real()));
    if (random() % 2 == 0) request.cache_salt = "\"\\\n\xc3\xa4";
    json expected = {{"prompt", request.prompt},
                     {"n", 1},
                     {"max_tokens", s.max_tokens},
                     {"min_tokens", s.min_tokens},
                     {"temperature", s.temperature},
                     {"top_k", s.top_k},
                     {"top_p", s.top_p},
                     {"min_p", s.min_p},
                     {"repetition_penalty", s.repetition_penalty},
                     {"presence_penalty", s.presence_penalty},
                     {"frequency_penalty", s.frequency_penalty},
                     {"seed", static_cast<int64_t>(s.seed)},
                     {"ignore_eos", s.ignore_eos},
                     {"return_tokens_as_token_ids", true},
                     {"detokenize", false},
                     {"return_token_ids", true},
                     {"stream", true},
                     {"stream_options", {{"include_usage", true}, {"continuous_usage_stats", true}}}};
    if (!s.stop_token_ids.empty()) expected["stop_token_ids"] = s.stop_token_ids;
    if (s.num_logprobs >= 0) expected["logprobs"] = s.num_logprobs;
    for (const auto& [token, bias] : s.logit_bias) expected["logit_bias"][std::to_string(token)] = bias;
    if (!request.cache_salt.empty()) expected["cache_salt"] = request.cache_salt;
    ASSERT_EQ(json::parse(decode_body(request, "")), expected) << "seed " << seed;

    for (const char* field : {"return_token_ids", "stream_options"}) expected.erase(field);
    expected["max_tokens"] = 1;
    expected["min_tokens"] = std::min<int64_t>(s.min_tokens, 1);
    expected["stream"] = false;
    expected["kv_transfer_params"] = {{"a", 1}};
    ASSERT_EQ(json::parse(prefill_body(request, R"({"a":1})")), expected) << "seed " << seed;
  }
}

TEST(Reader, ReadsTokensLogprobsUsageAndFinish) {
  CompletionReader reader(3, 2);
  const json usage = {
      {"prompt_tokens", 3}, {"completion_tokens", 1}, {"prompt_tokens_details", {{"cached_tokens", 2}}}};
  const float tie = -1.5f;
  CompletionReader::Update update = reader.read(
      chunk({{"index", 0},
             {"text", ""},
             {"token_ids", {7}},
             {"logprobs",
              {{"token_logprobs", {-2.25f}},
               {"tokens", {"token_id:7"}},
               {"top_logprobs", json::array({{{"token_id:30", tie}, {"token_id:4", tie}, {"token_id:7", -2.25f}}})}}},
             {"finish_reason", nullptr}},
            usage));
  ASSERT_TRUE(update.event && !update.error);
  ASSERT_EQ(update.event->tokens.size(), 1u);
  EXPECT_EQ(update.event->tokens[0].token, 7);
  EXPECT_EQ(update.event->tokens[0].logprob, -2.25f);
  // Two best, ties to the lowest id, and not the chosen one that came along.
  EXPECT_EQ(update.event->tokens[0].top_logprobs, (std::vector<std::pair<TokenId, float>>{{4, tie}, {30, tie}}));
  EXPECT_EQ(update.event->usage.prompt_tokens, 3);
  EXPECT_EQ(update.event->usage.cached_tokens, 2);
  EXPECT_FALSE(update.event->finish);

  update = reader.read(
      chunk({{"index", 0}, {"token_ids", json::array()}, {"finish_reason", "stop"}, {"stop_reason", 9}}, usage));
  ASSERT_TRUE(update.event);
  EXPECT_EQ(update.event->finish, engine::FinishReason::kStop);
  EXPECT_EQ(update.event->stop_token, 9);
}

TEST(Reader, KeepsFloatBits) {
  for (const float value : {-0.1f, -1e-30f, -17.123457f, std::nextafter(-1.0f, 0.0f)}) {
    CompletionReader reader(1, 0);
    const CompletionReader::Update update = reader.read(
        chunk({{"token_ids", {1}}, {"logprobs", {{"token_logprobs", {value}}, {"top_logprobs", nullptr}}}}));
    ASSERT_TRUE(update.event) << value;
    EXPECT_EQ(update.event->tokens[0].logprob, value);
  }
}

TEST(Reader, TakesTheLastTokenAsTheStopWhenNoneIsNamed) {
  CompletionReader reader(1, -1);
  const json usage = {{"prompt_tokens", 1}};
  EXPECT_FALSE(reader.read(chunk({{"token_ids", {4}}}, usage)).event->finish);
  const CompletionReader::Update update =
      reader.read(chunk({{"token_ids", {2}}, {"finish_reason", "stop"}, {"stop_reason", nullptr}}, usage));
  EXPECT_EQ(update.event->stop_token, 2);
}

TEST(Reader, WaitsForLateUsage) {
  CompletionReader reader(3, -1);
  EXPECT_FALSE(reader.read(chunk({{"token_ids", {4}}, {"finish_reason", "length"}})).event);
  const CompletionReader::Update update =
      reader.read(R"({"choices":[],"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":1}}})");
  ASSERT_TRUE(update.event);
  EXPECT_EQ(update.event->finish, engine::FinishReason::kLength);
  EXPECT_EQ(update.event->usage.cached_tokens, 1);
  EXPECT_FALSE(reader.read("[DONE]").event);

  CompletionReader without_usage(3, -1);
  EXPECT_FALSE(without_usage.read(chunk({{"token_ids", {4}}, {"finish_reason", "length"}})).event);
  ASSERT_TRUE(without_usage.read("[DONE]").event);
}

TEST(Reader, FindsTheReservation) {
  CompletionReader reader(3, -1);
  const CompletionReader::Update update =
      reader.read(R"({"choices":[],"kv_transfer_params":{"remote_port":5,"vendor":[1]}})");
  EXPECT_EQ(json::parse(update.transfer), json({{"remote_port", 5}, {"vendor", {1}}}));
  EXPECT_FALSE(update.event || update.error);
}

TEST(Reader, MapsErrorEvents) {
  const auto kind_of = [](const char* data) { return CompletionReader(1, -1).read(data).error.value().kind; };
  EXPECT_EQ(kind_of(R"({"error":{"message":"m","type":"server_error","code":"internal_error"}})"),
            ErrorKind::kInternal);
  EXPECT_EQ(kind_of(R"({"error":{"message":"m","type":"server_error","code":"upstream_timeout"}})"),
            ErrorKind::kDeadlineExceeded);
  EXPECT_EQ(kind_of(R"({"error":{"message":"m","type":"service_unavailable_error"}})"), ErrorKind::kUnavailable);
  EXPECT_EQ(kind_of(R"({"error":{"message":"m","type":"BadRequestError","code":400}})"), ErrorKind::kInvalidArgument);
  EXPECT_EQ(CompletionReader(1, -1).read(R"({"error":{"message":"why"}})").error->message, "why");
}

TEST(Reader, RefusesGarbage) {
  for (const char* data :
       {"", "[]", "{", R"({"choices":[{"token_ids":"x"}]})", R"({"choices":[{"token_ids":[1.5]}]})"}) {
    CompletionReader reader(1, -1);
    EXPECT_EQ(reader.read(data).error.value().kind, ErrorKind::kDataLoss) << data;
  }
  CompletionReader with_logprobs(1, 1);
  EXPECT_EQ(with_logprobs.read(R"({"choices":[{"token_ids":[1]}]})").error.value().kind, ErrorKind::kDataLoss);
  EXPECT_EQ(
      with_logprobs.read(R"({"choices":[{"token_ids":[1],"logprobs":{"token_logprobs":["x"]}}]})").error.value().kind,
      ErrorKind::kDataLoss);
}

TEST(Response, ErrorsKeepStatusMessageAndParam) {
  const Error error =
      error_of_response(400, R"({"error":{"message":"too long","param":"prompt","code":"context_length_exceeded"}})");
  EXPECT_EQ(error.kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(error.message, "too long");
  EXPECT_EQ(error.param, "prompt");
  EXPECT_EQ(error.code, "context_length_exceeded");
  EXPECT_EQ(error_of_response(503, "<html>").kind, ErrorKind::kUnavailable);
  EXPECT_EQ(error_of_response(401, "").kind, ErrorKind::kInternal);  // the router's key, not the client's
  EXPECT_EQ(*read_prefill_response(R"({"choices":[],"kv_transfer_params":{"a":1}})"), R"({"a":1})");
  EXPECT_EQ(*read_prefill_response(R"({"choices":[]})"), "");
  EXPECT_FALSE(read_prefill_response("nonsense").ok());
}

}  // namespace
}  // namespace tandem::router
