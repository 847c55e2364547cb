#include "src/text/text_bundle.h"

#include <filesystem>

#include "src/text/test_support.h"

namespace tandem::text {
namespace {

class TextBundleFiles : public testing::Test {
 protected:
  void SetUp() override {
    const testing::TestInfo* info = testing::UnitTest::GetInstance()->current_test_info();
    directory_ = std::filesystem::path(testing::TempDir()) / (std::string("text_bundle_") + info->name());
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directory(directory_);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  void write(const std::string& name, const std::string& content) {
    std::ofstream(directory_ / name, std::ios::binary) << content;
  }

  std::filesystem::path directory_;
};

TEST_F(TextBundleFiles, LoadsWhatIsThereAndTravelsAsJson) {
  const TextBundle fixture = load_fixture("qwen_like");
  write("tokenizer.json", fixture.tokenizer_json);
  write("config.json", "{\"eos_token_id\": 3}");
  write("chat_template.jinja", "{{ 'ünï' }}\n");
  const TextBundle bundle = TextBundle::load(directory_).value();
  EXPECT_EQ(bundle.tokenizer_json, fixture.tokenizer_json);
  EXPECT_EQ(bundle.chat_template, "{{ 'ünï' }}\n");
  EXPECT_EQ(bundle.tokenizer_config_json, "");
  EXPECT_EQ(TextBundle::from_json(bundle.to_json()).value(), bundle);
}

TEST_F(TextBundleFiles, MissingAndDamagedFilesAreNamed) {
  write("config.json", "{}");
  Result<TextBundle> result = TextBundle::load(directory_);
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.error().kind, ErrorKind::kNotFound);
  EXPECT_NE(result.error().message.find("tokenizer.json"), std::string::npos);
  for (const std::string bad : {"\xC0\xAF", "\xED\xA0\x80", "\xF5\x80\x80\x80", "ab\xE2\x82", "\x80"}) {
    write("tokenizer.json", bad);
    result = TextBundle::load(directory_);
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.error().kind, ErrorKind::kDataLoss);
    EXPECT_NE(result.error().message.find("UTF-8"), std::string::npos);
  }
  write("tokenizer.json", "\xF4\x8F\xBF\xBF\xEF\xBF\xBD\xC2\x80");
  EXPECT_TRUE(TextBundle::load(directory_).ok());
}

TEST(TextBundle, RefusesOtherJson) {
  for (const char* wrong :
       {"", "[]", "{}", "{\"tokenizer.json\": \"x\"}", "{\"tokenizer.json\": 1, \"config.json\": \"\"}",
        "{\"tokenizer.json\": \"x\", \"config.json\": {}}"}) {
    const Result<TextBundle> result = TextBundle::from_json(wrong);
    ASSERT_FALSE(result.ok()) << wrong;
    EXPECT_EQ(result.error().kind, ErrorKind::kDataLoss);
  }
}

}  // namespace
}  // namespace tandem::text
