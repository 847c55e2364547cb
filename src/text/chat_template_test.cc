#include "src/text/chat_template.h"

#include <chrono>
#include <thread>

#include "src/text/test_support.h"

namespace tandem::text {
namespace {

struct Chat {
  explicit Chat(const std::string& name, const std::string& jinja = "") : tokenizer(make_tokenizer(name)) {
    TextBundle bundle = load_fixture(name);
    bundle.chat_template = jinja;
    made.emplace(ChatTemplate::create(bundle, tokenizer));
  }
  Result<EncodedChat> encode(const OrderedJson& messages) const {
    const std::string text = messages.dump();
    return made->value().encode({.messages = text});
  }
  // The control tokens of the prompt in order.
  std::vector<TokenId> controls(const OrderedJson& messages) const {
    std::vector<TokenId> found;
    const EncodedChat encoded = encode(messages).value();
    for (const TokenId id : encoded.ids) {
      if (tokenizer.is_control(id)) found.push_back(id);
    }
    return found;
  }

  Tokenizer tokenizer;
  std::optional<Result<ChatTemplate>> made;
};

OrderedJson say(const std::string& content) { return {{{"role", "user"}, {"content", content}}}; }

TEST(ChatTemplate, RendersAndEncodesAsTransformersDoes) {
  for (const std::string name : {"qwen_like", "deepseek_like", "llama_like"}) {
    const Chat chat(name);
    for (const OrderedJson& item : read_golden(name).at("chat")) {
      OrderedJson kwargs = item["arguments"];
      const std::string messages = kwargs["messages"].dump();
      const std::string tools = kwargs.contains("tools") ? kwargs["tools"].dump() : "";
      const bool add_generation_prompt = kwargs.value("add_generation_prompt", false);
      const bool continue_final_message = kwargs.value("continue_final_message", false);
      for (const char* key : {"messages", "tools", "add_generation_prompt", "continue_final_message"})
        kwargs.erase(key);
      const std::string more = kwargs.dump();
      const ChatRequest request{messages, tools, more, add_generation_prompt, continue_final_message};
      EXPECT_EQ(chat.made->value().render(request).value(), item["text"].get<std::string>()) << item["arguments"];
      const EncodedChat encoded = chat.made->value().encode(request).value();
      EXPECT_EQ(encoded.ids, item["ids"].get<std::vector<TokenId>>()) << item["arguments"];
      EXPECT_EQ(encoded.text, item["text"].get<std::string>());
    }
  }
}

TEST(ChatTemplate, RandomContentNeverAddsAControlToken) {
  const uint64_t seed = std::random_device{}();
  std::mt19937_64 random(seed);
  for (const std::string name : {"qwen_like", "deepseek_like", "llama_like"}) {
    const Chat chat(name);
    const std::vector<TokenId> expected = chat.controls(say("x"));
    const std::vector<std::string> parts = {"<",
                                            "|",
                                            ">",
                                            "<|",
                                            "|>",
                                            "｜",
                                            "im_start",
                                            "im_end",
                                            "User",
                                            "<｜User｜>",
                                            "<|im_end|>",
                                            "</s>",
                                            "<s",
                                            "/s>",
                                            "s>",
                                            "<think>",
                                            "</think>",
                                            " ",
                                            "\n",
                                            "</tool_response>",
                                            "<|im_start|>system",
                                            "é",
                                            "\U000F0001"};
    for (int round = 0; round < 400; ++round) {
      std::string content = "a";
      for (uint64_t i = random() % 12; i > 0; --i) content += parts[random() % parts.size()];
      content += "b";
      const OrderedJson messages = say(content);
      ASSERT_EQ(chat.controls(messages), expected) << name << ", seed " << seed << ": " << content;
      ASSERT_NE(chat.encode(messages)->text.find(content), std::string::npos) << name << ", seed " << seed;
    }
  }
}

TEST(ChatTemplate, TemplatesStillSeeTheTagsTheyLookFor) {
  const Chat chat("qwen_like");
  OrderedJson messages = say("<|im_end|>");
  messages.push_back({{"role", "assistant"}, {"content", "<think>\nsecret <|im_start|>\n</think>\n\nopen <|im_end|>"}});
  messages.push_back({{"role", "user"}, {"content", "more"}});
  const std::string text = chat.encode(messages)->text;
  EXPECT_EQ(text.find("secret"), std::string::npos) << text;
  EXPECT_NE(text.find("open <|im_end|><|im_end|>\n"), std::string::npos) << text;
}

TEST(ChatTemplate, RaisedMessagesReachTheCaller) {
  const Chat chat("qwen_like", "{{ raise_exception('Roles must alternate') }}");
  const Result<EncodedChat> result = chat.encode(say("x"));
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.error().kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(result.error().param, "messages");
  EXPECT_EQ(result.error().message, "Roles must alternate");
}

TEST(ChatTemplate, FaultsNameTheField) {
  const Chat chat("qwen_like");
  const ChatTemplate& chat_template = chat.made->value();
  const std::string messages = say("x").dump();
  EXPECT_EQ(chat_template.render({.messages = messages, .tools = "{}"}).error().param, "tools");
  EXPECT_EQ(chat_template.render({.messages = messages, .kwargs = "[1]"}).error().param, "chat_template_kwargs");
  EXPECT_EQ(chat_template.render({.messages = "nonsense"}).error().param, "messages");
  EXPECT_EQ(chat_template.render({.messages = "\"\xFF\""}).error().param, "messages");
}

TEST(ChatTemplate, AbsentAndBrokenTemplatesAreRefused) {
  EXPECT_EQ(Chat("gpt2_like").made->error().kind, ErrorKind::kUnsupported);
  EXPECT_EQ(Chat("qwen_like", "{% for %}").made->error().kind, ErrorKind::kDataLoss);
  EXPECT_EQ(Chat("qwen_like", "{% include 'x' %}").made->error().kind, ErrorKind::kDataLoss);
}

TEST(ChatTemplate, MaliciousTemplatesEndSoon) {
  for (const std::string jinja : {
           "{% for i in range(10**9) %}x{% endfor %}",
           "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
           "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
           "{% for i in range(99999) %}{{ messages[0].content * 9999 }}{% endfor %}",
           "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
           "{% set ns = namespace(s=['x']) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
       }) {
    const Chat chat("qwen_like", jinja);
    for (int round = 0; round < 2; ++round) {
      const auto start = std::chrono::steady_clock::now();
      const Result<EncodedChat> result = chat.encode(say("x"));
      ASSERT_FALSE(result.ok()) << jinja;
      EXPECT_EQ(result.error().kind, ErrorKind::kInvalidArgument) << result.error().message;
      EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(120)) << jinja;
    }
  }
}

TEST(ChatTemplate, ManyThreadsGetTheSamePrompt) {
  const Chat chat("qwen_like");
  const OrderedJson messages = say("Hello <|im_end|> there");
  const std::vector<TokenId> expected = chat.encode(messages)->ids;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 20; ++round) EXPECT_EQ(chat.encode(messages)->ids, expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(ChatTemplate, PrintsItsSpeed) {
  const Chat chat("qwen_like");
  const OrderedJson messages = say("Hello there, how is the river?");
  constexpr int kRounds = 200;
  const auto start = std::chrono::steady_clock::now();
  for (int round = 0; round < kRounds; ++round) EXPECT_TRUE(chat.encode(messages).ok());
  const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
  std::printf("render and encode a short chat: %.0f us\n", elapsed.count() / kRounds);
}

}  // namespace
}  // namespace tandem::text
