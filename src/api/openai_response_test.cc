#include "src/api/openai_response.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace tandem::api {
namespace {

using engine::FinishReason;
using engine::GeneratedToken;

// Token i is the letter 'a' + i; 25 and 26 are the two halves of "ä".
std::string_view letter(TokenId token) {
  static std::string text;
  text = token == 25 ? "\xC3" : token == 26 ? "\xA4" : std::string(1, static_cast<char>('a' + token));
  return text;
}

ResponseWriter writer(const OpenAiRequest& request) { return {request, "cmpl-1", 1700, letter}; }

Json event_json(std::string_view event) {
  EXPECT_TRUE(event.starts_with("data: "));
  EXPECT_TRUE(event.ends_with("\n\n"));
  return parse_strict_json(event.substr(6, event.size() - 8), "chunk").value();
}

TEST(ResponseWriter, WritesCompletionChunks) {
  OpenAiRequest request;
  request.model = "m\"x";
  const ResponseWriter w = writer(request);
  int64_t offset = 0;
  const std::vector<GeneratedToken> tokens = {{.token = 1, .logprob = 0, .top_logprobs = {}}};
  EXPECT_EQ(
      w.chunk({.index = 2, .text = "b", .tokens = tokens, .finish = {}, .stop_reason = {}, .prompt = {}}, offset,
              std::nullopt, ""),
      "data: {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1700,\"model\":\"m\\\"x\",\"choices\":[{"
      "\"index\":2,\"text\":\"b\",\"logprobs\":null,\"finish_reason\":null}]}\n\n");
  EXPECT_EQ(
      w.chunk({.index = 0, .text = "", .tokens = {}, .finish = FinishReason::kStop, .stop_reason = "END", .prompt = {}},
              offset, UsageCounts{3, 4, 2}, "{\"k\":1}"),
      "data: {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1700,\"model\":\"m\\\"x\",\"choices\":[{"
      "\"index\":0,\"text\":\"\",\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":\"END\"}],"
      "\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4,\"total_tokens\":7,"
      "\"prompt_tokens_details\":{\"cached_tokens\":2}},\"kv_transfer_params\":{\"k\":1}}\n\n");
  EXPECT_EQ(event_json(w.bare_chunk(UsageCounts{1, 2, 0}, ""))["choices"].size(), 0U);
}

TEST(ResponseWriter, WritesChatChunks) {
  OpenAiRequest request;
  request.endpoint = Endpoint::kChat;
  request.return_token_ids = true;
  const ResponseWriter w = writer(request);
  const std::vector<TokenId> prompt = {7, 8};
  const Json role = event_json(w.role_chunk(1, prompt, std::nullopt));
  EXPECT_EQ(role["object"], "chat.completion.chunk");
  EXPECT_EQ(role["choices"].dump(),
            R"([{"index":1,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}])");
  EXPECT_EQ(role["prompt_token_ids"].dump(), "[7,8]");
  int64_t offset = 0;
  const std::vector<GeneratedToken> tokens = {{.token = 1, .logprob = 0, .top_logprobs = {}}};
  const Json chunk = event_json(w.chunk(
      {.index = 1, .text = "b", .tokens = tokens, .finish = FinishReason::kLength, .stop_reason = {}, .prompt = prompt},
      offset, std::nullopt, ""));
  EXPECT_EQ(chunk["choices"].dump(), R"([{"index":1,"delta":{"content":"b"},"logprobs":null,"finish_reason":"length",)"
                                     R"("stop_reason":null,"token_ids":[1]}])");
}

TEST(ResponseWriter, WritesCompletionLogprobs) {
  OpenAiRequest request;
  request.sampling.num_logprobs = 2;
  request.return_token_ids = true;
  const std::vector<GeneratedToken> tokens = {
      {.token = 0, .logprob = -0.5F, .top_logprobs = {{0, -0.5F}, {1, -INFINITY}}},
      {.token = 25, .logprob = -3, .top_logprobs = {{2, -1}, {3, -2}}},
      {.token = 26, .logprob = -4, .top_logprobs = {{25, -1}, {26, -4}}},
      {.token = 4, .logprob = NAN, .top_logprobs = {}},
  };
  const std::vector<TokenId> prompt = {9};
  const ChoicePart part{.index = 0,
                        .text =
                            "a\xC3\xA4"
                            "e",
                        .tokens = tokens,
                        .finish = FinishReason::kStop,
                        .stop_reason = TokenId{4},
                        .prompt = prompt};
  const std::vector<ChoicePart> parts = {part};
  const Json whole = parse_strict_json(writer(request).whole(parts, {1, 4, 0}, "", prompt), "whole").value();
  const Json& choice = whole["choices"][0];
  EXPECT_EQ(choice["logprobs"]["tokens"].dump(), "[\"a\",\"\xEF\xBF\xBD\",\"\xEF\xBF\xBD\",\"e\"]");
  EXPECT_EQ(choice["logprobs"]["token_logprobs"].dump(), "[-0.5,-3.0,-4.0,-9999.0]");
  EXPECT_EQ(choice["logprobs"]["text_offset"].dump(), "[0,1,2,3]");
  // The chosen token first; two tokens that look the same are one key.
  EXPECT_EQ(choice["logprobs"]["top_logprobs"].dump(),
            "[{\"a\":-0.5,\"b\":-9999.0},{\"\xEF\xBF\xBD\":-3.0,\"c\":-1.0,\"d\":-2.0},{\"\xEF\xBF\xBD\":-4.0},"
            "{\"e\":-9999.0}]");
  EXPECT_EQ(choice["stop_reason"], 4);
  EXPECT_EQ(choice["token_ids"].dump(), "[0,25,26,4]");
  EXPECT_EQ(choice["prompt_token_ids"].dump(), "[9]");
  EXPECT_FALSE(whole.contains("prompt_token_ids"));
}

TEST(ResponseWriter, WritesChatLogprobsAndNamesById) {
  OpenAiRequest request;
  request.endpoint = Endpoint::kChat;
  request.sampling.num_logprobs = 1;
  const std::vector<GeneratedToken> tokens = {{.token = 25, .logprob = -3, .top_logprobs = {{2, -1}}}};
  const ChoicePart part{
      .index = 0, .text = "x", .tokens = tokens, .finish = FinishReason::kStop, .stop_reason = {}, .prompt = {}};
  const std::vector<ChoicePart> parts = {part};
  const auto logprobs = [&] {
    return parse_strict_json(writer(request).whole(parts, {}, "", {}), "whole")
        .value()["choices"][0]["logprobs"]
        .dump();
  };
  EXPECT_EQ(logprobs(),
            "{\"content\":[{\"token\":\"\xEF\xBF\xBD\",\"logprob\":-3.0,\"bytes\":[195],"
            "\"top_logprobs\":[{\"token\":\"c\",\"logprob\":-1.0,\"bytes\":[99]}]}]}");
  request.return_tokens_as_token_ids = true;
  EXPECT_NE(logprobs().find("\"token\":\"token_id:25\""), std::string::npos);
}

}  // namespace
}  // namespace tandem::api
