#include "src/text/stream_decoder.h"

#include <chrono>

#include "src/text/test_support.h"

namespace tandem::text {
namespace {

TEST(StreamDecoder, PiecesTogetherAreTheBatchDecode) {
  const uint64_t seed = std::random_device{}();
  std::mt19937_64 random(seed);
  for (const std::string& name : kFixtures) {
    const Tokenizer tokenizer = make_tokenizer(name);
    for (int round = 0; round < 300; ++round) {
      const std::vector<TokenId> ids = random_ids(random, tokenizer);
      const bool skip = random() % 2 == 0;
      StreamDecoder stream(tokenizer, {.skip_special_tokens = skip});
      const std::string batch = tokenizer.decode(ids, skip);
      std::string text;
      for (const TokenId id : ids) {
        text += stream.push(id);
        ASSERT_TRUE(batch.starts_with(text)) << name << ", seed " << seed << ", round " << round;
      }
      text += stream.finish();
      ASSERT_EQ(text, batch) << name << ", seed " << seed << ", round " << round;
    }
  }
}

TEST(StreamDecoder, TextSurvivesEncodingAndStreaming) {
  for (const std::string name : {"qwen_like", "deepseek_like", "gpt2_like", "llama_like"}) {
    const Tokenizer tokenizer = make_tokenizer(name);
    for (const std::string text :
         {"Die Straße 😀👩‍👩‍👧 долина, 谷を <|im_end|> </s>", "a\n\n b", "\xEF\xBF\xBD?"}) {
      StreamDecoder stream(tokenizer, {});
      std::string out;
      const std::vector<TokenId> ids = tokenizer.encode(text, true).value();
      for (const TokenId id : ids) out += stream.push(id);
      out += stream.finish();
      EXPECT_EQ(out, text) << name;
    }
  }
}

TEST(StreamDecoder, SpecialTokensAreSkippedOrShown) {
  const Tokenizer tokenizer = make_tokenizer("qwen_like");
  const TokenId end = tokenizer.eos_id().value();
  EXPECT_EQ(StreamDecoder(tokenizer, {.skip_special_tokens = true}).push(end), "");
  EXPECT_EQ(StreamDecoder(tokenizer, {.skip_special_tokens = false}).push(end), "<|im_end|>");
}

TEST(StreamDecoder, IdsWithoutATokenStandForNothing) {
  const Tokenizer tokenizer = make_tokenizer("qwen_like");
  StreamDecoder stream(tokenizer, {});
  for (const TokenId id : {-1, -2147483647, 710, 2147483647}) EXPECT_EQ(stream.push(id), "");
  EXPECT_EQ(stream.finish(), "");
}

TEST(StreamDecoder, OutlivesItsTokenizer) {
  auto tokenizer = std::make_unique<Tokenizer>(make_tokenizer("gpt2_like"));
  const std::vector<TokenId> ids = tokenizer->encode("river", false).value();
  StreamDecoder stream(*tokenizer, {});
  tokenizer.reset();
  std::string text;
  for (const TokenId id : ids) text += stream.push(id);
  EXPECT_EQ(text, "river");
}

TEST(StreamDecoder, PrintsItsSpeed) {
  const Tokenizer tokenizer = make_tokenizer("qwen_like");
  const std::vector<TokenId> ids = tokenizer.encode("The people of the valley, долина 谷を流れ 😀", false).value();
  StreamDecoder stream(tokenizer, {});
  size_t bytes = 0;
  size_t tokens = 0;
  const auto start = std::chrono::steady_clock::now();
  for (; tokens < 300'000; tokens += ids.size()) {
    for (const TokenId id : ids) bytes += stream.push(id).size();
  }
  const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
  std::printf("stream decode: %.3f us/token\n", elapsed.count() / static_cast<double>(tokens));
  EXPECT_GT(bytes, tokens);
}

}  // namespace
}  // namespace tandem::text
