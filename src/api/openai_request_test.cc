// What good requests become. Bad ones are in frontend_test.cc, where they go through the whole server.
#include "src/api/openai_request.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace tandem::api {
namespace {

ServedModel served_model() {
  ServedModel model;
  model.names = {"m", "alias"};
  model.max_model_len = 100;
  model.vocab_size = 50;
  model.eos_ids = {1};
  return model;
}

OpenAiRequest completion(const std::string& text, const ServedModel& model = served_model()) {
  const Json body = parse_strict_json(text, "x").value();
  return parse_completion_request(body, model, {.accepts_kv_transfer = true}).value();
}
OpenAiRequest chat(const std::string& text) {
  return parse_chat_request(parse_strict_json(text, "x").value(), served_model(), {}).value();
}

TEST(OpenAiRequest, HasTheDefaultsOfTheApi) {
  const OpenAiRequest request =
      completion(R"({"model":"alias","prompt":"hello","unknown":{"x":[1]},"user":"u","stop":null})");
  EXPECT_EQ(request.model, "alias");
  EXPECT_EQ(std::get<std::string>(request.prompts.at(0)), "hello");
  EXPECT_EQ(request.n, 1);
  EXPECT_EQ(request.sampling.temperature, 1.0);
  EXPECT_EQ(request.sampling.top_p, 1.0);
  EXPECT_EQ(request.sampling.top_k, 0);
  EXPECT_EQ(request.sampling.min_p, 0.0);
  EXPECT_EQ(request.sampling.repetition_penalty, 1.0);
  EXPECT_EQ(request.sampling.num_logprobs, -1);
  EXPECT_FALSE(request.max_tokens || request.seed || request.stream || request.kv_transfer);
  EXPECT_TRUE(request.skip_special_tokens && request.detokenize);
}

TEST(OpenAiRequest, TakesDefaultsFromTheModel) {
  ServedModel model = served_model();
  model.defaults =
      parse_generation_config(
          R"({"temperature":0.6,"top_p":0.95,"top_k":20,"repetition_penalty":1.1,"eos_token_id":[1,2],"do_sample":true})")
          .value();
  const OpenAiRequest request = completion(R"({"model":"m","prompt":"x","top_p":0.5})", model);
  EXPECT_EQ(request.sampling.temperature, 0.6);
  EXPECT_EQ(request.sampling.top_p, 0.5);
  EXPECT_EQ(request.sampling.top_k, 20);
  EXPECT_EQ(request.sampling.repetition_penalty, 1.1);
  EXPECT_FALSE(parse_generation_config(R"({"temperature":"hot"})").ok());
  EXPECT_TRUE(parse_generation_config("").ok());
}

TEST(OpenAiRequest, ReadsEveryParameter) {
  const OpenAiRequest r = completion(
      R"({"model":"m","prompt":[3,4],"max_tokens":7,"temperature":0.5,"top_p":0.9,"top_k":5,"min_p":0.1,
          "repetition_penalty":1.5,"presence_penalty":-2,"frequency_penalty":2,"seed":-3,"logit_bias":{"7":-100,"49":1.5},
          "stop":["a","b"],"stop_token_ids":[9],"min_tokens":2,"ignore_eos":true,"include_stop_str_in_output":true,
          "skip_special_tokens":false,"logprobs":4,"n":3,"stream":true,
          "stream_options":{"include_usage":true,"continuous_usage_stats":true},"return_token_ids":true,
          "return_tokens_as_token_ids":true,"cache_salt":"s","echo":false,"best_of":1,"suffix":"","logit_bias_":1,
          "response_format":{"type":"text"},"tool_choice":"none"})");
  EXPECT_EQ(std::get<std::vector<TokenId>>(r.prompts.at(0)), (std::vector<TokenId>{3, 4}));
  EXPECT_EQ(r.max_tokens, 7);
  EXPECT_EQ(r.sampling.temperature, 0.5);
  EXPECT_EQ(r.sampling.top_k, 5);
  EXPECT_EQ(r.sampling.min_p, 0.1);
  EXPECT_EQ(r.sampling.presence_penalty, -2);
  EXPECT_EQ(r.sampling.frequency_penalty, 2);
  EXPECT_EQ(r.seed, -3);
  EXPECT_EQ(r.sampling.logit_bias, (std::vector<std::pair<TokenId, float>>{{7, -100.0F}, {49, 1.5F}}));
  EXPECT_EQ(r.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(r.sampling.stop_token_ids, std::vector<TokenId>{9});
  EXPECT_EQ(r.sampling.min_tokens, 2);
  EXPECT_EQ(r.sampling.num_logprobs, 4);
  EXPECT_EQ(r.n, 3);
  EXPECT_EQ(r.cache_salt, "s");
  EXPECT_TRUE(r.sampling.ignore_eos && r.include_stop_str_in_output && !r.skip_special_tokens && r.stream);
  EXPECT_TRUE(r.include_usage && r.continuous_usage_stats && r.return_token_ids && r.return_tokens_as_token_ids);
}

TEST(OpenAiRequest, TreatsATinyTemperatureAsGreedy) {
  EXPECT_EQ(completion(R"({"model":"m","prompt":"x","temperature":1e-320})").sampling.temperature, 0.0);
  EXPECT_EQ(completion(R"({"model":"m","prompt":"x","top_k":-1})").sampling.top_k, 0);
  EXPECT_EQ(completion(R"({"model":"m","prompt":"x","top_k":9223372036854775807})").sampling.top_k, 0);
}

TEST(OpenAiRequest, NeedsNoModelForTokensOnly) {
  const OpenAiRequest request = completion(R"({"prompt":[3],"detokenize":false})");
  EXPECT_EQ(request.model, "m");
  EXPECT_FALSE(request.detokenize);
  EXPECT_TRUE(request.return_tokens_as_token_ids);
}

TEST(OpenAiRequest, ReadsKvTransferParameters) {
  const OpenAiRequest request = completion(
      R"({"model":"m","prompt":[3],"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,
          "remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}})");
  ASSERT_TRUE(request.kv_transfer);
  EXPECT_TRUE(request.kv_transfer->do_remote_decode);
}

TEST(OpenAiRequest, ReadsChats) {
  const OpenAiRequest r = chat(
      R"({"model":"m","max_tokens":9,"max_completion_tokens":8,"logprobs":true,"top_logprobs":2,
          "chat_template_kwargs":{"enable_thinking":false},
          "messages":[{"role":"developer","content":"be brief"},
                      {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}],"name":"joe"},
                      {"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function",
                        "function":{"name":"f","arguments":"{\"z\":1,\"a\":[2]}"}}]},
                      {"role":"tool","tool_call_id":"c1","content":"42"}]})");
  EXPECT_EQ(r.max_tokens, 8);
  EXPECT_EQ(r.sampling.num_logprobs, 2);
  EXPECT_EQ(r.chat.template_kwargs, R"({"enable_thinking":false})");
  EXPECT_TRUE(r.chat.add_generation_prompt && !r.chat.continue_final_message);
  EXPECT_EQ(
      r.chat.messages,
      R"([{"role":"system","content":"be brief"},{"role":"user","content":"a\nb","name":"joe"},)"
      R"({"role":"assistant","content":"","tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":{"z":1,"a":[2]}}}]},)"
      R"({"role":"tool","content":"42","tool_call_id":"c1"}])");
  const OpenAiRequest plain = chat(R"({"model":"m","messages":[{"role":"user","content":"x"}],"logprobs":true})");
  EXPECT_EQ(plain.sampling.num_logprobs, 0);
}

TEST(TokenRequests, FanOutSeedsAndIds) {
  const OpenAiRequest request =
      completion(R"({"model":"m","prompt":[[1,2],[3]],"n":2,"seed":5,"max_tokens":4,"cache_salt":"s"})");
  const std::vector<engine::TokenRequest> out =
      make_token_requests(request, {{1, 2}, {3}}, served_model(), "id", 77).value();
  ASSERT_EQ(out.size(), 4U);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(out[i].prompt, i < 2 ? (std::vector<TokenId>{1, 2}) : std::vector<TokenId>{3});
    EXPECT_EQ(out[i].sampling.seed, 5 + i % 2);
    EXPECT_EQ(out[i].external_id, fmt::format("id-{}", i));
    EXPECT_EQ(out[i].sampling.max_tokens, 4);
    EXPECT_EQ(out[i].cache_salt, "s");
    EXPECT_EQ(out[i].deadline_us, 77);
  }
  const OpenAiRequest unseeded = completion(R"({"model":"m","prompt":[1],"n":2})");
  const std::vector<engine::TokenRequest> drawn = make_token_requests(unseeded, {{1}}, served_model(), "id", 0).value();
  EXPECT_NE(drawn[0].sampling.seed, drawn[1].sampling.seed);
}

TEST(TokenRequests, FillTheContext) {
  const OpenAiRequest request = completion(R"({"model":"m","prompt":"x"})");
  const auto max_tokens = [&](const OpenAiRequest& r, size_t prompt_length) {
    return make_token_requests(r, {std::vector<TokenId>(prompt_length, 3)}, served_model(), "id", 0)
        .value()[0]
        .sampling.max_tokens;
  };
  EXPECT_EQ(max_tokens(request, 10), 16);
  EXPECT_EQ(max_tokens(request, 95), 5);
  EXPECT_EQ(max_tokens(chat(R"({"model":"m","messages":[{"role":"user","content":"x"}]})"), 10), 90);
  EXPECT_EQ(max_tokens(completion(R"({"model":"m","prompt":"x","max_tokens":90})"), 10), 90);
}

}  // namespace
}  // namespace tandem::api
