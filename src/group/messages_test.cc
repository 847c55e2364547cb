#include "src/group/messages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace tandem::group {
namespace {

using testing::HasSubstr;

std::vector<Message> all_messages() {
  const WindowAddress window{{10, 3, 4096}, {10, 4, 4096}, 0xFFFFFFFFFFFFFFFF, "00ff"};
  return {JoinMessage{.rank = -3,
                      .shape = {4, 2},
                      .incarnation = 0xFFFFFFFFFFFFFFFF,
                      .attempt = 2,
                      .pid = 77,
                      .node = "node \"1\"",
                      .http_address = "[::1]:8000",
                      .rank_timeout_us = 5,
                      .last_epoch = 9,
                      .facts = {{"model", "m\n"}, {"", ""}},
                      .options = {{"--seed", "5"}}},
          RefusedMessage{true, "no"},
          FormMessage{Epoch(3), {"a", "b"}},
          WindowMessage{Epoch(3), window},
          MapMessage{Epoch(3), {window, window}},
          MappedMessage{Epoch(3)},
          OpenMessage{Epoch(3)},
          EndedMessage{Epoch(3), true, "why"},
          FaultMessage{Epoch(3), -1, "why"},
          LeaveMessage{"bye"},
          BeatMessage{"…"}};
}

TEST(Messages, ComeBackAsTheyWere) {
  ASSERT_EQ(all_messages().size(), std::variant_size_v<Message>);
  for (const Message& message : all_messages()) {
    const std::string text = encode_message(message);
    const Result<Message> decoded = decode_message(text);
    ASSERT_TRUE(decoded.ok()) << text << ": " << decoded.error().message;
    EXPECT_EQ(decoded->index(), message.index());
    EXPECT_EQ(encode_message(*decoded), text);
  }
  const Result<Message> decoded = decode_message(encode_message(all_messages()[0]));
  const JoinMessage& join = std::get<JoinMessage>(*decoded);
  EXPECT_EQ(join.rank, -3);
  EXPECT_EQ(join.incarnation, 0xFFFFFFFFFFFFFFFF);
  EXPECT_EQ(join.facts[0].value, "m\n");
  ASSERT_EQ(join.options.size(), 1U);
  EXPECT_EQ(join.options[0].name, "--seed");
}

TEST(Messages, RefusesWhatIsNotExactlyOne) {
  const auto fault = [](const std::string& text) {
    const Result<Message> decoded = decode_message(text);
    return decoded.ok() ? "none" : decoded.error().message;
  };
  EXPECT_THAT(fault("{"), HasSubstr("not JSON"));
  EXPECT_THAT(fault("[]"), HasSubstr("no object"));
  EXPECT_THAT(fault("{}"), HasSubstr("type is missing"));
  EXPECT_THAT(fault(R"({"type":""})"), HasSubstr("without a type"));
  EXPECT_THAT(fault(R"({"type":"dance"})"), HasSubstr("unknown type \"dance\""));
  EXPECT_THAT(fault(R"({"type":"open"})"), HasSubstr("epoch is missing"));
  EXPECT_THAT(fault(R"({"type":"open","epoch":-1})"), HasSubstr("epoch is no integer"));
  EXPECT_THAT(fault(R"({"type":"open","epoch":1.5})"), HasSubstr("epoch is no integer"));
  EXPECT_THAT(fault(R"({"type":"open","epoch":18446744073709551615})"), HasSubstr("epoch is no integer"));
  EXPECT_THAT(fault(R"({"type":"open","epoch":1,"more":2})"), HasSubstr("3 fields instead of 2"));
  EXPECT_THAT(fault(R"({"type":"beat","text":7})"), HasSubstr("text is no text"));
  EXPECT_THAT(fault(R"({"type":"beat","text":")" + std::string(2000, 'x') + "\"}"), HasSubstr("at most 1024 bytes"));
  EXPECT_THAT(fault(R"({"type":"map","epoch":1,"windows":[{}]})"), HasSubstr("region is missing"));
  // Another version is understood as far as that.
  const Result<Message> other = decode_message(R"({"type":"join","protocol":3,"unheard":[]})");
  ASSERT_TRUE(other.ok());
  EXPECT_EQ(std::get<JoinMessage>(*other).protocol, 3);
}

TEST(Messages, NoByteThatChangesBreaksTheDecoder) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  for (const Message& message : all_messages()) {
    for (int i = 0; i < 500; ++i) {
      std::string text = encode_message(message);
      text[random() % text.size()] = static_cast<char>(random());
      if (random() % 4 == 0) text.resize(random() % text.size());
      const Result<Message> decoded = decode_message(text);
      EXPECT_TRUE(!decoded.ok() || !encode_message(*decoded).empty());
    }
  }
}

TEST(Messages, LongTextsAreClippedAtACharacter) {
  const std::string clipped = clip_text(std::string(kMaxTextBytes - 4, 'x') + "ääää");
  EXPECT_LE(std::ssize(clipped), kMaxTextBytes);
  EXPECT_THAT(clipped, testing::EndsWith("x…"));
  EXPECT_EQ(clip_text("short"), "short");
}

}  // namespace
}  // namespace tandem::group
