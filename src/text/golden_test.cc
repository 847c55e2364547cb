// The demo model's text against what transformers' tokenizer does with the same files (tests/golden/demo/text.json).
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "src/text/chat_template.h"
#include "src/text/stream_decoder.h"
#include "src/text/tokenizer.h"

namespace tandem::text {
namespace {

using Json = nlohmann::ordered_json;

class DemoText : public testing::Test {
 protected:
  DemoText()
      : bundle_(TextBundle::load(std::string(TANDEM_SOURCE_DIR) + "/models/demo").value()),
        tokenizer_(Tokenizer::create(bundle_).value()) {
    std::ifstream file(std::string(TANDEM_SOURCE_DIR) + "/tests/golden/demo/text.json");
    golden_ = Json::parse(file);
  }
  static std::vector<TokenId> ids(const Json& json) { return json.get<std::vector<TokenId>>(); }

  TextBundle bundle_;
  Tokenizer tokenizer_;
  Json golden_;
};

TEST_F(DemoText, ChatsRenderAndEncodeAsInTransformers) {
  const ChatTemplate chat = ChatTemplate::create(bundle_, tokenizer_).value();
  ASSERT_GE(golden_["chats"].size(), 30U);
  for (const Json& item : golden_["chats"]) {
    const std::string messages = item["messages"].dump();
    const ChatRequest request{.messages = messages, .add_generation_prompt = item["add_generation_prompt"].get<bool>()};
    EXPECT_EQ(chat.render(request).value(), item["rendered"].get<std::string>()) << messages;
    EXPECT_EQ(chat.encode(request).value().ids, ids(item["ids"])) << messages;
  }
}

TEST_F(DemoText, TextsEncodeAsInTransformers) {
  ASSERT_GE(golden_["texts"].size(), 30U);
  for (const Json& item : golden_["texts"]) {
    const std::string text = item["text"].get<std::string>();
    EXPECT_EQ(tokenizer_.encode(text, false).value(), ids(item["ids"])) << text;
    EXPECT_EQ(tokenizer_.encode(text, true).value(), ids(item["ids_with_bos"])) << text;
  }
}

TEST_F(DemoText, IdsDecodeAsInTransformers) {
  ASSERT_GE(golden_["decodes"].size(), 50U);
  for (const Json& item : golden_["decodes"]) {
    const std::vector<TokenId> tokens = ids(item["ids"]);
    EXPECT_EQ(tokenizer_.decode(tokens, false), item["text"].get<std::string>()) << item["ids"];
    EXPECT_EQ(tokenizer_.decode(tokens, true), item["text_without_control_tokens"].get<std::string>()) << item["ids"];
    StreamDecoder stream(tokenizer_, {.skip_special_tokens = true});
    std::string streamed;
    for (TokenId token : tokens) streamed += stream.push(token);
    streamed += stream.finish();
    EXPECT_EQ(streamed, item["text_without_control_tokens"].get<std::string>()) << item["ids"];
  }
}

}  // namespace
}  // namespace tandem::text
