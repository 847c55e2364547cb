#include "src/text/tokenizer.h"

#include <chrono>
#include <thread>

#include "src/text/test_support.h"

namespace tandem::text {
namespace {

TEST(Tokenizer, EncodesAndDecodesAsTransformersDoes) {
  for (const std::string& name : kFixtures) {
    const Tokenizer tokenizer = make_tokenizer(name);
    const OrderedJson& golden = read_golden(name);
    for (const OrderedJson& item : golden.at("encode")) {
      const std::string text = item["text"];
      EXPECT_EQ(tokenizer.encode(text, item["special"]).value(), item["ids"].get<std::vector<TokenId>>())
          << name << ": " << text;
    }
    for (const OrderedJson& item : golden.at("decode")) {
      const std::vector<TokenId> ids = item["ids"];
      EXPECT_EQ(tokenizer.decode(ids, item["skip"]), item["text"].get<std::string>()) << name << ": " << item["ids"];
    }
  }
}

TEST(Tokenizer, KnowsItsTokens) {
  const Tokenizer tokenizer = make_tokenizer("qwen_like");
  EXPECT_EQ(tokenizer.vocab_size(), 710);
  EXPECT_FALSE(tokenizer.bos_id());
  EXPECT_EQ(tokenizer.eos_id(), 702);
  EXPECT_EQ(tokenizer.token_bytes(702), "<|im_end|>");
  EXPECT_TRUE(tokenizer.is_special(702) && tokenizer.is_control(702) && tokenizer.has_token(702));
  const TokenId think = tokenizer.encode("<think>", false).value().at(0);
  EXPECT_EQ(tokenizer.token_bytes(think), "<think>");
  EXPECT_TRUE(!tokenizer.is_special(think) && !tokenizer.is_control(think) && tokenizer.has_token(think));
  for (const TokenId id : {-1, 710, 1 << 30}) {
    EXPECT_TRUE(tokenizer.token_bytes(id).empty() && !tokenizer.has_token(id) && !tokenizer.is_special(id)) << id;
  }
}

TEST(Tokenizer, TokenBytesMayBeHalfACharacter) {
  const Tokenizer tokenizer = make_tokenizer("qwen_like");
  const std::string text = "𝄞";
  std::string bytes;
  const std::vector<TokenId> ids = tokenizer.encode(text, false).value();
  for (const TokenId id : ids) {
    EXPECT_EQ(tokenizer.token_text(id), "\xEF\xBF\xBD");
    bytes += tokenizer.token_bytes(id);
  }
  EXPECT_EQ(bytes, text);
}

TEST(Tokenizer, DeepSeekRoleMarksAreControlThoughNotFlagged) {
  const Tokenizer tokenizer = make_tokenizer("deepseek_like");
  const std::vector<TokenId> ids = tokenizer.encode("<｜User｜>hi<｜Assistant｜><｜end▁of▁sentence｜>", false).value();
  for (const TokenId id : ids) {
    EXPECT_FALSE(tokenizer.is_control(id)) << tokenizer.token_bytes(id);
  }
  EXPECT_EQ(tokenizer.encode("x", true).value().at(0), tokenizer.bos_id());
}

TEST(Tokenizer, StopIdsAreTheUnion) {
  TextBundle bundle = load_fixture("qwen_like");
  bundle.config_json = R"({"eos_token_id": [700, 5]})";
  bundle.generation_config_json = R"({"eos_token_id": 5})";
  EXPECT_EQ(Tokenizer::create(bundle).value().stop_ids(), (std::vector<TokenId>{5, 700, 702}));
  for (const char* wrong : {R"({"eos_token_id": -1})", R"({"eos_token_id": "x"})", R"({"eos_token_id": [1.5]})",
                            R"({"eos_token_id": 4294967296})", "[]", "{"}) {
    bundle.generation_config_json = wrong;
    const Result<Tokenizer> result = Tokenizer::create(bundle);
    ASSERT_FALSE(result.ok()) << wrong;
    EXPECT_EQ(result.error().kind, ErrorKind::kDataLoss);
  }
}

TEST(Tokenizer, InvalidUtf8IsTheCallersFault) {
  const Tokenizer tokenizer = make_tokenizer("qwen_like");
  const Result<std::vector<TokenId>> result = tokenizer.encode("ab\xFF", false);
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.error().kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(result.error().param, "prompt");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(std::string_view("a\0b", 3), false).value(), true).size(), 3U);
}

TEST(Tokenizer, DamagedFilesAreErrors) {
  const TextBundle whole = load_fixture("qwen_like");
  TextBundle bundle = whole;
  for (size_t cut = 0; cut < whole.tokenizer_json.size(); cut += whole.tokenizer_json.size() / 37) {
    bundle.tokenizer_json = whole.tokenizer_json.substr(0, cut);
    const Result<Tokenizer> result = Tokenizer::create(bundle);
    ASSERT_FALSE(result.ok()) << cut;
    EXPECT_EQ(result.error().kind, ErrorKind::kDataLoss) << cut;
  }
  // A flipped byte is an error or another tokenizer, never a crash.
  const uint64_t seed = std::random_device{}();
  std::mt19937_64 random(seed);
  for (int round = 0; round < 200; ++round) {
    bundle.tokenizer_json = whole.tokenizer_json;
    bundle.tokenizer_json[random() % bundle.tokenizer_json.size()] = static_cast<char>(random());
    const Result<Tokenizer> result = Tokenizer::create(bundle);
    if (result.ok()) {
      const Result<std::vector<TokenId>> ids = result->encode("The river, 123 долина", true);
      EXPECT_TRUE(ids.ok() || ids.error().kind != ErrorKind::kInternal) << "seed " << seed;
    } else {
      EXPECT_NE(result.error().kind, ErrorKind::kInternal) << "seed " << seed << ": " << result.error().message;
    }
  }
}

TEST(Tokenizer, ManyThreadsGetTheSameIds) {
  const Tokenizer tokenizer = make_tokenizer("qwen_like");
  const OrderedJson& golden = read_golden("qwen_like");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 5; ++round) {
        for (const OrderedJson& item : golden.at("encode")) {
          const std::string text = item["text"];
          EXPECT_EQ(tokenizer.encode(text, item["special"]).value(), item["ids"].get<std::vector<TokenId>>());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(Tokenizer, RefusesWhatCannotFitBeforeItIsEncoded) {
  const Tokenizer tokenizer = make_tokenizer("qwen_like");
  const std::string text(30UL << 20, 'a');
  const Result<std::vector<TokenId>> ids = tokenizer.encode(text, false, {.max_tokens = 4096});
  ASSERT_FALSE(ids.ok());
  EXPECT_EQ(ids.error().kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(ids.error().param, "prompt");
  EXPECT_EQ(ids.error().code, "context_length_exceeded");
  EXPECT_TRUE(ids.error().message.starts_with("at least ")) << ids.error().message;
}

TEST(Tokenizer, StopsWhenTheFlagIsSet) {
  const Tokenizer tokenizer = make_tokenizer("qwen_like");
  const std::string text(30UL << 20, 'a');
  std::atomic<bool> stop = false;
  std::thread setter([&stop] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    stop = true;
  });
  const Result<std::vector<TokenId>> ids = tokenizer.encode(text, false, {.stop = &stop});
  setter.join();
  ASSERT_FALSE(ids.ok());
  EXPECT_EQ(ids.error().kind, ErrorKind::kAborted);
}

// One word of many megabytes costs what as many bytes of short words do, about.
TEST(Tokenizer, TakesLongWordsInLinearTime) {
  const Tokenizer tokenizer = make_tokenizer("qwen_like");
  const auto time_us = [&](size_t bytes) {
    const std::string text(bytes, 'a');
    const auto start = std::chrono::steady_clock::now();
    EXPECT_FALSE(tokenizer.encode(text, false).value().empty());
    const auto elapsed = std::chrono::steady_clock::now() - start;
    return static_cast<double>(std::chrono::duration_cast<std::chrono::microseconds>(elapsed).count());
  };
  time_us(1UL << 20);
  const double small_us = std::min(time_us(1UL << 20), time_us(1UL << 20));
  const double large_us = time_us(16UL << 20);
  std::printf("one word: %.1f MB/s\n", static_cast<double>(16UL << 20) / large_us);
  EXPECT_LT(large_us / small_us, 16 * 4);
  EXPECT_LT(large_us, 5e6);
}

// Not a test of speed: prints it, and fails only if time is not about linear in the length.
TEST(Tokenizer, PrintsItsSpeed) {
  const Tokenizer tokenizer = make_tokenizer("qwen_like");
  std::string unit;
  for (const OrderedJson& item : read_golden("qwen_like").at("encode")) unit += item["text"].get<std::string>() + " ";
  const auto time_us = [&](size_t bytes) {
    std::string text;
    while (text.size() < bytes) text += unit;
    const auto start = std::chrono::steady_clock::now();
    EXPECT_FALSE(tokenizer.encode(text, false).value().empty());
    const auto elapsed = std::chrono::steady_clock::now() - start;
    return static_cast<double>(std::chrono::duration_cast<std::chrono::microseconds>(elapsed).count());
  };
  time_us(100'000);
  const double small_us = std::min(time_us(500'000), time_us(500'000));
  const double large_us = std::min(time_us(2'000'000), time_us(2'000'000));
  std::printf("encode: %.1f MB/s\n", 2'000'000 / large_us);
  EXPECT_LT(large_us / small_us, 12);
}

}  // namespace
}  // namespace tandem::text
