#include "src/api/strict_json.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "src/api/json_text.h"

namespace tandem::api {
namespace {

using namespace std::string_literals;

std::string repeat(std::string_view text, size_t count) {
  std::string out;
  for (size_t i = 0; i < count; ++i) out += text;
  return out;
}

TEST(StrictJson, KeepsValuesAndOrder) {
  const Json json =
      parse_strict_json(R"( {"b":[1,-2,3.5,true,null,"xä\u0000😀"],"a":{},"c":18446744073709551615} )", "x").value();
  EXPECT_EQ(json.dump(), R"({"b":[1,-2,3.5,true,null,"xä\u0000😀"],"a":{},"c":18446744073709551615})");
  EXPECT_EQ(json["b"][5].get<std::string>().size(), 8U);
  EXPECT_TRUE(parse_strict_json(repeat("[", 64) + repeat("]", 64), "x").ok());
  EXPECT_TRUE(parse_strict_json("\"alone\"", "x").ok());
}

TEST(StrictJson, RefusesWhatParsersReadDifferently) {
  std::string forty_keys;
  for (int i = 1; i <= 39; ++i) forty_keys += fmt::format("\"k{}\":0,", i);
  const std::vector<std::pair<const char*, std::string>> cases = {
      {"empty", ""},
      {"space", "  "},
      {"truncated", "{\"a\":"},
      {"garbage after", "{} x"},
      {"second value", "{}{}"},
      {"comment", "{/**/}"},
      {"line comment", "{} // x"},
      {"trailing comma", "[1,]"},
      {"single quotes", "{'a':1}"},
      {"unquoted key", "{a:1}"},
      {"NUL after", "{}\0"s},
      {"NUL and garbage", "{}\0x"s},
      {"NUL in string", "\"a\0b\""s},
      {"control in string", "\"a\nb\""},
      {"byte order mark", "\xEF\xBB\xBF{}"},
      {"UTF-16", "{\0}\0"s},
      {"NaN", "{\"a\":NaN}"},
      {"Infinity", "[Infinity]"},
      {"-Infinity", "[-Infinity]"},
      {"1e9999", "[1e9999]"},
      {"400 digits", "[" + repeat("9", 400) + "]"},
      {"leading zero", "[01]"},
      {"plus", "[+1]"},
      {"hex", "[0x10]"},
      {"bare point", "[1.]"},
      {"bad UTF-8", "\"\xff\""},
      {"overlong UTF-8", "\"\xc0\xaf\""},
      {"UTF-8 surrogate", "\"\xed\xa0\x80\""},
      {"cut UTF-8", "\"\xe2\x82\""},
      {"lone high surrogate", "\"\\ud800\""},
      {"lone low surrogate", "\"\\udc00\""},
      {"bad escape", "\"\\x\""},
      {"equal keys", "{\"a\":1,\"a\":1}"},
      {"equal keys, escaped", "{\"a\":1,\"\\u0061\":1}"},
      {"equal keys, deep", "[{\"a\":{\"b\":1,\"c\":2,\"b\":3}}]"},
      {"equal keys, the 3rd of 39 again", "{" + forty_keys + "\"k3\":1}"},
      {"equal keys, the 36th of 39 again", "{" + forty_keys + "\"k36\":1}"},
      {"equal keys, the 40th twice", "{" + forty_keys + "\"k40\":1,\"k40\":2}"},
      {"depth 65", repeat("[", 65) + repeat("]", 65)},
      {"100000 arrays", repeat("[", 100'000)},
      {"100000 objects", repeat("{\"a\":", 100'000)},
      {"too many values", "[" + repeat("1,", 1'000'000) + "1]"},
  };
  for (const auto& [name, text] : cases) {
    const Result<Json> parsed = parse_strict_json(text, "the body");
    ASSERT_FALSE(parsed.ok()) << name;
    EXPECT_EQ(parsed.error().kind, ErrorKind::kInvalidArgument) << name;
    EXPECT_NE(parsed.error().message.find("the body"), std::string::npos) << name;
  }
  EXPECT_EQ(parse_strict_json("{\"a\":1,\"a\":1}", "it").error().message, "it has a key twice in one object");
  EXPECT_EQ(parse_strict_json("[1,x]", "it").error().message, "could not parse the JSON of it: it is wrong at byte 4");
}

TEST(StrictJson, ReadsManyKeysInLinearTime) {
  std::string text = "{";
  for (int i = 0; i < 400'000; ++i) text += fmt::format("{}\"k{}\":0", i == 0 ? "" : ",", i);
  EXPECT_EQ(parse_strict_json(text + "}", "x")->size(), 400'000U);
}

TEST(JsonText, WritesValidJson) {
  std::string out;
  append_json_string(out, "a\"\\\n\t\x01\x7f/ä😀\xff\xed\xa0\x80\xe2\x82"s + "\0"s);
  EXPECT_EQ(out,
            "\"a\\\"\\\\\\n\\t\\u0001\\u007f/"
            "ä😀\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\\u0000\"");
  EXPECT_TRUE(parse_strict_json(out, "x").ok());
  for (const float value : {0.0F, -0.0F, 1.0F, -9999.0F, 1e-45F, 3.4028235e38F, 0.1F, -12.345679F}) {
    std::string text;
    append_json_number(text, value);
    const Json json = parse_strict_json(text, "x").value();
    EXPECT_TRUE(json.is_number_float()) << text;
    EXPECT_EQ(json.get<float>(), value) << text;
  }
}

TEST(JsonText, RandomTextAndNumbersReadBack) {
  const uint64_t seed = std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  const std::vector<std::string> pieces = {"a",    "word", "\"", "\\", "\n", "\r", "\t", "\x01", "\x1f",
                                           "\x7f", "/",    "ä",  "€",  "😀",  "\b", " ",  "{",    "\xc2\x80"};
  for (int run = 0; run < 20'000; ++run) {
    std::string text, json;
    for (uint64_t n = random() % 12; n > 0; --n) text += pieces[random() % pieces.size()];
    append_json_string(json, text);
    const Result<Json> read = parse_strict_json(json, "x");
    ASSERT_TRUE(read.ok()) << "seed " << seed << ": " << json;
    ASSERT_EQ(read->get<std::string>(), text) << "seed " << seed;

    double real = 0;
    const uint64_t bits = random();
    std::memcpy(&real, &bits, sizeof real);
    if (std::isfinite(real)) {
      json.clear();
      append_json_number(json, real);
      ASSERT_EQ(parse_strict_json(json, "x")->get<double>(), real) << "seed " << seed << ": " << json;
    }
    json.clear();
    append_json_number(json, static_cast<int64_t>(bits));
    ASSERT_EQ(json, std::to_string(static_cast<int64_t>(bits)));
  }
}

TEST(JsonText, CountsCodePoints) {
  EXPECT_EQ(count_code_points("aä😀"), 3);
  EXPECT_EQ(count_code_points("\xff\xe2\x82"), 3);
  EXPECT_EQ(count_code_points(""), 0);
}

}  // namespace
}  // namespace tandem::api
