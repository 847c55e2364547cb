#include "src/transfer/wire.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "src/transfer/test_support.h"

namespace tandem::transfer {
namespace {

using testing::HasSubstr;

Hello make_hello() {
  return {"prefill:0011223344556677", "model-a/rev1", KvRole::kProducer, 10'000'000, make_layout()};
}

FirstToken make_first_token() { return {42, -0.25F, {{42, -0.25F}, {7, -1.5F}}, 32}; }

std::vector<Message> make_all() {
  const Handle handle = make_handle(17);
  return {make_hello(),
          Refuse{"no"},
          Begin{handle, 100, 3, 5'000'000},
          Accept{handle, 4},
          Pull{handle, 100, 0, 0},
          Data{handle, 2, 8, 4, 0x1122334455667788},
          Data{handle, 2, 8, 4, std::nullopt},
          Commit{handle, 100, 1 << 20, make_first_token()},
          Commit{handle, 100, 0, std::nullopt},
          Ack{handle, 1 << 20},
          Abort{handle, Side::kReceiver, "client left", {1, 2, 3}},
          AbortAck{handle, Side::kSender},
          Heartbeat{handle, Side::kSender},
          Fault{handle, Side::kReceiver, FaultCode::kConsumed, "used"}};
}

TEST(Wire, EveryMessageSurvivesTheTrip) {
  for (const Message& message : make_all()) {
    const std::vector<std::byte> bytes = encode(message);
    const Result<Message> back = decode(bytes);
    ASSERT_TRUE(back.ok()) << message_name(message) << ": " << back.error().message;
    EXPECT_EQ(back->index(), message.index());
    EXPECT_EQ(encode(*back), bytes) << message_name(message);
    std::printf("%-10s %zu bytes\n", message_name(message), bytes.size());
  }
  const Message message = decode(encode(make_hello())).value();
  const Hello& hello = std::get<Hello>(message);
  EXPECT_EQ(hello.engine_id, "prefill:0011223344556677");
  EXPECT_EQ(hello.layout, make_layout());
  EXPECT_EQ(hello.role, KvRole::kProducer);
  const Message commit_message = decode(encode(Commit{make_handle(1), 9, 8, make_first_token()})).value();
  const Commit& commit = std::get<Commit>(commit_message);
  EXPECT_EQ(commit.first_token->token, 42);
  EXPECT_EQ(commit.first_token->logprob, -0.25F);
  EXPECT_EQ(commit.first_token->top_logprobs, make_first_token().top_logprobs);
  EXPECT_EQ(commit.first_token->cached_tokens, 32);
}

TEST(Wire, HeadersFitTheTransport) {
  const Handle handle = make_handle(UINT64_MAX);
  EXPECT_LE(std::ssize(encode(Data{handle, 1, 2, 3, 4})), comm::kMaxHeaderBytes);
  FirstToken first;
  first.top_logprobs.resize(kMaxTopLogprobs);
  EXPECT_LE(std::ssize(encode(Commit{handle, 1, 2, first})), comm::kMaxMessageBytes);
  Hello hello = make_hello();
  hello.engine_id = std::string(10'000, 'x');
  EXPECT_EQ(std::get<Hello>(decode(encode(hello)).value()).engine_id.size(), kMaxNameBytes);  // cut
}

TEST(Wire, EveryTruncationAndExtensionIsAnError) {
  for (const Message& message : make_all()) {
    std::vector<std::byte> bytes = encode(message);
    for (size_t size = 0; size < bytes.size(); ++size) {
      std::vector<std::byte> cut(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size));
      EXPECT_FALSE(decode(cut).ok());
      if (cut.size() < 8) continue;
      const uint32_t length = static_cast<uint32_t>(size);  // also with a length that agrees
      std::memcpy(cut.data() + 4, &length, sizeof length);
      EXPECT_FALSE(decode(cut).ok()) << message_name(message) << " cut to " << size;
    }
    bytes.push_back(std::byte{0});
    EXPECT_FALSE(decode(bytes).ok());
    const uint32_t length = static_cast<uint32_t>(bytes.size());
    std::memcpy(bytes.data() + 4, &length, sizeof length);
    EXPECT_FALSE(decode(bytes).ok());
  }
}

TEST(Wire, SaysWhatIsWrong) {
  std::vector<std::byte> bytes = encode(Ack{make_handle(1), 5});
  bytes[2] = std::byte{9};
  EXPECT_THAT(decode(bytes).error().message, HasSubstr("version 9"));
  EXPECT_THAT(decode(bytes).error().message, HasSubstr(fmt::format("this worker {}", kWireVersion)));
  bytes = encode(Ack{make_handle(1), 5});
  bytes[3] = std::byte{200};
  EXPECT_THAT(decode(bytes).error().message, HasSubstr("unknown type 200"));
  bytes[3] = std::byte{0};
  EXPECT_FALSE(decode(bytes).ok());
  bytes = encode(Ack{make_handle(1), 5});
  const uint32_t huge = 0xffffffff;
  std::memcpy(bytes.data() + 4, &huge, sizeof huge);
  EXPECT_THAT(decode(bytes).error().message, HasSubstr("4294967295"));
  EXPECT_FALSE(decode(encode(Ack{make_handle(1), -1})).ok());
  EXPECT_FALSE(decode(encode(Ack{make_handle(1), INT64_MAX})).ok());
}

TEST(Wire, RandomBytesNeverCrash) {
  std::mt19937_64 random(kFirstSeed);
  std::printf("seed %lu\n", static_cast<unsigned long>(kFirstSeed));
  const std::vector<Message> all = make_all();
  int64_t accepted = 0;
  for (int round = 0; round < 200'000; ++round) {
    std::vector<std::byte> bytes = encode(all[random() % all.size()]);
    if (round % 4 == 0) {
      bytes.resize(8 + random() % 100);
      for (size_t i = 8; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(random());
    } else {
      for (uint64_t flips = 1 + random() % 4; flips > 0; --flips) {
        bytes[random() % bytes.size()] = static_cast<std::byte>(random());
      }
    }
    const uint32_t length = static_cast<uint32_t>(bytes.size());
    if (round % 8 != 1) std::memcpy(bytes.data() + 4, &length, sizeof length);
    const Result<Message> message = decode(bytes);
    if (!message.ok()) continue;
    ++accepted;
    EXPECT_EQ(encode(*message), bytes);  // one encoding per message
  }
  EXPECT_GT(accepted, 1000);
}

TEST(Wire, IncompatiblePeersAreToldBothValues) {
  const Hello mine = make_hello();
  Hello theirs = make_hello();
  theirs.engine_id = "decode:1";
  theirs.role = KvRole::kConsumer;
  EXPECT_TRUE(check_compatible(mine, theirs).ok());
  theirs.fingerprint = "model-b";
  EXPECT_THAT(check_compatible(mine, theirs).error().message,
              testing::AllOf(HasSubstr("model-a/rev1"), HasSubstr("model-b"), HasSubstr("decode:1")));
  theirs = make_hello();
  theirs.role = KvRole::kConsumer;
  theirs.layout.block_size = 64;
  EXPECT_TRUE(check_compatible(mine, theirs).ok());
  for (const int64_t size : {int64_t{0}, kMaxBlockTokens + 1}) {
    theirs.layout.block_size = size;
    EXPECT_THAT(check_compatible(mine, theirs).error().message,
                testing::AllOf(HasSubstr(fmt::format("{} tokens", size)), HasSubstr("1 … 1024")));
  }
  theirs.layout = make_layout(4);
  EXPECT_THAT(check_compatible(mine, theirs).error().message,
              testing::AllOf(HasSubstr("3 layers"), HasSubstr("4 layers")));
  theirs.layout = make_layout();
  theirs.layout.latent_dim = 10;  // same bytes, other meaning
  theirs.layout.rope_dim = 2;
  EXPECT_THAT(check_compatible(mine, theirs).error().message,
              testing::AllOf(HasSubstr("latent 8, rope 4"), HasSubstr("latent 10, rope 2")));
  theirs = make_hello();
  EXPECT_THAT(check_compatible(mine, theirs).error().message, HasSubstr("kv_producer"));
  Hello both = make_hello();
  both.role = KvRole::kBoth;
  EXPECT_TRUE(check_compatible(both, both).ok());
}

TEST(Handle, ParsesOnlyWhatItPrints) {
  const Handle handle = make_handle(12345);
  EXPECT_EQ(parse_handle(handle.to_string()), handle);
  EXPECT_NE(make_handle(12345), handle);
  EXPECT_EQ(handle.to_string().size(), 5U + 1 + 32);
  const std::string nonce(32, 'a');
  EXPECT_TRUE(parse_handle("0-" + nonce).has_value());
  EXPECT_TRUE(parse_handle("18446744073709551615-" + nonce).has_value());
  for (const std::string& bad :
       {std::string(), std::string("-"), "-" + nonce, "1" + nonce, "01-" + nonce, "+1-" + nonce,
        "18446744073709551616-" + nonce, "1-" + nonce + "a", "1-" + nonce.substr(1), "1-" + std::string(32, 'A'),
        "1-" + std::string(32, 'g'), " 1-" + nonce}) {
    EXPECT_FALSE(parse_handle(bad).has_value()) << bad;
  }
}

}  // namespace
}  // namespace tandem::transfer
