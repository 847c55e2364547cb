#include "src/router/chunk_scan.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

namespace tandem::router {
namespace {

using nlohmann::json;

// What the scanner must find, by a JSON reader. Nothing if the text is none, or has what is not the scanner's to read.
std::optional<ChunkFields> read_as_document(std::string_view text) {
  const json chunk = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!chunk.is_object()) return std::nullopt;
  const auto is_object = [&](const char* name) { return chunk.contains(name) && chunk[name].is_object(); };
  if (is_object("error") || is_object("kv_transfer_params")) return std::nullopt;
  const auto integer = [](const json& object, const char* name) -> std::optional<int64_t> {
    if (!object.contains(name) || !object[name].is_number_integer()) return std::nullopt;
    return object[name].get<int64_t>();
  };
  ChunkFields out;
  if (is_object("usage")) {
    out.has_usage = true;
    out.prompt_tokens = integer(chunk["usage"], "prompt_tokens");
    if (chunk["usage"].contains("prompt_tokens_details") && chunk["usage"]["prompt_tokens_details"].is_object()) {
      out.cached_tokens = integer(chunk["usage"]["prompt_tokens_details"], "cached_tokens");
    }
  }
  if (!chunk.contains("choices") || !chunk["choices"].is_array() || chunk["choices"].empty()) return out;
  const json& choice = chunk["choices"].front();
  if (!choice.is_object()) return std::nullopt;
  out.has_choice = true;
  if (choice.contains("token_ids") && !choice["token_ids"].is_null()) {
    if (!choice["token_ids"].is_array()) return std::nullopt;
    for (const json& id : choice["token_ids"]) {
      if (!id.is_number_integer()) return std::nullopt;
      out.tokens.push_back({.token = id.get<TokenId>(), .logprob = 0, .top_logprobs = {}});
    }
  }
  if (choice.contains("finish_reason") && choice["finish_reason"].is_string()) {
    out.finish = finish_of_name(choice["finish_reason"].get<std::string>());
  }
  out.stop_reason = integer(choice, "stop_reason");
  return out;
}

// All of it as text, to be compared with ==.
std::string show(const std::optional<ChunkFields>& fields) {
  if (!fields) return "nothing";
  const auto number = [](const auto& value) { return value ? std::to_string(static_cast<int64_t>(*value)) : "-"; };
  std::string out = fmt::format("usage {} {} {} choice {} finish {} stop {} tokens", fields->has_usage,
                                number(fields->prompt_tokens), number(fields->cached_tokens), fields->has_choice,
                                number(fields->finish), number(fields->stop_reason));
  for (const engine::GeneratedToken& token : fields->tokens) out += fmt::format(" {}", token.token);
  return out;
}

const char* const kUsual[] = {
    R"({"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"m","choices":[{"index":0,"text":"",)"
    R"("logprobs":null,"finish_reason":null,"token_ids":[12345]}],"usage":{"prompt_tokens":33,"completion_tokens":1,)"
    R"("total_tokens":34,"prompt_tokens_details":{"cached_tokens":16}}})",
    R"({"choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"length","stop_reason":null,)"
    R"("token_ids":[0,2147483647,7]}],"usage":{"prompt_tokens":1,"prompt_tokens_details":{"cached_tokens":0}}})",
    R"({"choices":[{"finish_reason":"stop","stop_reason":151645,"token_ids":[]}],"usage":null})",
    R"({"choices": [{"finish_reason": "stop", "stop_reason": "text", "token_ids": null}], "error": null})",
    R"({"choices":[],"usage":{"prompt_tokens":33,"completion_tokens":1,"prompt_tokens_details":null}})",
    R"({"choices":[{"finish_reason":"tool_calls"}]})",
    R"({"choices":[{"finish_reason":"abort","token_ids":[1]}],"usage":{}})",
    "{}",
};

TEST(ChunkScan, ReadsWhatWorkersUsuallySend) {
  for (const char* text : kUsual) {
    const std::optional<ChunkFields> scanned = scan_chunk(text);
    ASSERT_TRUE(scanned) << text;
    EXPECT_EQ(show(scanned), show(read_as_document(text))) << text;
  }
  EXPECT_EQ(show(scan_chunk(kUsual[1])), "usage true 1 0 choice true finish 1 stop - tokens 0 2147483647 7");
}

TEST(ChunkScan, LeavesTheUnusualToADocument) {
  for (const char* text : {
           "",
           " ",
           "[]",
           "null",
           "{",
           "{}x",
           "{\"a\":1,}",
           "{\"a\":01}",
           "{\"a\":1.5}",
           "{\"a\":-1}",
           "{\"a\":1e3}",
           "{\"a\":\"\\n\"}",
           "{\"a\":\"\x01\"}",
           "{\"a\":\"\xc3\xa4\"}",
           "{\"a\":nul}",
           "{\"a\":12345678901234567890}",
           R"({"error":{"message":"m"}})",
           R"({"kv_transfer_params":{}})",
           R"({"choices":null})",
           R"({"choices":[{},{}]})",
           R"({"choices":[7]})",
           R"({"choices":[{"token_ids":[-1]}]})",
           R"({"choices":[{"token_ids":[2147483648]}]})",
           R"({"choices":[{"token_ids":["1"]}]})",
           R"({"choices":[{"token_ids":[1],"token_ids":[2]}]})",
           R"({"choices":[{"logprobs":{"tokens":[]}}]})",
           R"({"choices":[{"finish_reason":"stop","finish_reason":null}]})",
           R"({"choices":[],"choices":[]})",
           R"({"usage":{"prompt_tokens":1},"usage":null})",
           R"({"usage":{"prompt_tokens":1,"prompt_tokens":2}})",
           R"({"usage":{"prompt_tokens_details":{"cached_tokens":1},"prompt_tokens_details":{}}})",
       }) {
    EXPECT_EQ(show(scan_chunk(text)), "nothing") << text;
  }
}

// Whatever the scanner accepts, a JSON reader must read alike; damage of any kind may only make it give up.
TEST(ChunkScan, AgreesWithAReaderOnDamagedChunks) {
  const uint64_t seed = std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  const std::string_view alphabet =
      "{}[]:,\"\\ 0123456789.eE-+ntful\t\n\x7f\xc3\xa4"
      "a";
  const char* const pieces[] = {"null",
                                "true",
                                "\"token_ids\":",
                                "\"usage\":",
                                "\"stop_reason\":1,",
                                "[1,2]",
                                "{}",
                                "\"finish_reason\":\"stop\",",
                                "\"error\":{},",
                                ",",
                                "\"choices\":[],",
                                "18446744073709551616"};
  int64_t accepted = 0;
  constexpr int kRuns = 300'000;
  for (int run = 0; run < kRuns; ++run) {
    std::string text = kUsual[random() % std::size(kUsual)];
    for (uint64_t edits = random() % 4; edits > 0; --edits) {
      const size_t at = random() % (text.size() + 1);
      switch (random() % 4) {
        case 0:
          text.insert(at, 1, alphabet[random() % alphabet.size()]);
          break;
        case 1:
          text.insert(at, pieces[random() % std::size(pieces)]);
          break;
        case 2:
          text.erase(at, random() % 8);
          break;
        default:
          if (at < text.size()) text[at] = alphabet[random() % alphabet.size()];
      }
    }
    const std::optional<ChunkFields> scanned = scan_chunk(text);
    if (!scanned) continue;
    ++accepted;
    ASSERT_EQ(show(scanned), show(read_as_document(text))) << "seed " << seed << ", run " << run << ": " << text;
  }
  EXPECT_GT(accepted, kRuns / 10) << "seed " << seed;
  EXPECT_LT(accepted, kRuns) << "seed " << seed;
}

}  // namespace
}  // namespace tandem::router
