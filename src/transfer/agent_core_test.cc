// Whole agents over a network in memory: chosen situations first, then random ones.
#include "src/transfer/agent_core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "src/base/log.h"
#include "src/transfer/test_engine.h"

namespace tandem::transfer {
namespace {

using testing::HasSubstr;

// One prefill and one decode engine on a network without faults.
class AgentCoreTest : public testing::Test {
 protected:
  static constexpr int64_t kPrefillPort = 1;
  static constexpr int64_t kDecodePort = 2;

  void settle() {
    do {
      while (prefill.core.pump() || decode.core.pump()) {
      }
    } while (network.step());
  }
  void advance(int64_t us) {
    clock.advance_us(us);
    prefill.core.run_timers();
    decode.core.run_timers();
    settle();
  }
  // A reservation of `count` blocks, the first `cached` being there already.
  std::string reserve(int64_t count, int64_t cached, TransferId* id, int64_t deadline_us = 0) {
    const std::vector<BlockId> blocks = decode.take(count - cached);
    std::vector<uint64_t> expected;
    for (int64_t i = cached; i < count; ++i)
      expected.push_back(prefill.seeds[prefill_blocks[static_cast<size_t>(i)].value]);
    *id = decode.open(true, blocks, expected);
    const Handle handle = make_handle(id->value);
    decode.core.expect(*id, handle, {cached, blocks, count * kBlockSize}, deadline_us);
    return handle.to_string();
  }
  TransferId begin(const std::string& handle, int64_t count, int64_t deadline_us = 0) {
    const TransferId id = prefill.open(false, prefill_blocks);
    prefill.core.begin_send(id, decode.address(handle), {0, prefill_blocks, count * kBlockSize}, deadline_us);
    return id;
  }
  void send_all(TransferId id, int64_t count) {
    for (int64_t layer = 0; layer < 3; ++layer) prefill.core.send_blocks(id, layer, 0, count);
    prefill.core.commit_send(id, FirstToken{7, -0.5F, {{7, -0.5F}}, 4});
  }
  std::string publish(int64_t count, TransferId* id) {
    *id = prefill.open(false, prefill_blocks);
    const Handle handle = make_handle(id->value);
    prefill.core.publish(*id, handle, {0, prefill_blocks, count * kBlockSize});
    return handle.to_string();
  }
  TransferId pull(const KvTransferParams& remote, int64_t count, int64_t cached = 0, int64_t tokens = 0) {
    const std::vector<BlockId> blocks = decode.take(count - cached);
    std::vector<uint64_t> expected;
    for (int64_t i = cached; i < count; ++i)
      expected.push_back(prefill.seeds[prefill_blocks[static_cast<size_t>(i)].value]);
    const TransferId id = decode.open(true, blocks, expected);
    decode.core.pull(id, remote, {cached, blocks, tokens == 0 ? count * kBlockSize : tokens}, 0);
    return id;
  }
  static ErrorKind kind_of(TestEngine& engine, TransferId id) { return engine.ended.at(id).status.error().kind; }
  static const std::string& text_of(TestEngine& engine, TransferId id) {
    return engine.ended.at(id).status.error().message;
  }

  std::mt19937_64 random{kFirstSeed};
  FakeNetwork network{random, {}};
  ManualClock clock;
  TestEngine prefill{network, clock, kPrefillPort, "prefill", 1};
  TestEngine decode{network, clock, kDecodePort, "decode", 2};
  std::vector<BlockId> prefill_blocks = prefill.take(5);
};

TEST_F(AgentCoreTest, PushDelivers) {
  TransferId receiving;
  const std::string handle = reserve(5, 2, &receiving);
  const TransferId sending = begin(handle, 5);
  prefill.core.send_blocks(sending, 0, 0, 3);
  settle();
  prefill.core.send_blocks(sending, 1, 0, 3);
  prefill.core.send_blocks(sending, 2, 0, 3);
  for (int64_t layer = 0; layer < 3; ++layer) prefill.core.send_blocks(sending, layer, 3, 2);
  settle();
  EXPECT_EQ(decode.ended.size(), 0U);
  prefill.core.commit_send(sending, FirstToken{7, -0.5F, {{7, -0.5F}}, 4});
  settle();
  const Done& received = decode.ended.at(receiving);
  ASSERT_TRUE(received.status.ok());
  EXPECT_EQ(received.first_token->token, 7);
  EXPECT_EQ(received.first_token->cached_tokens, 4);
  EXPECT_EQ(received.bytes, 3 * 3 * make_layout().block_bytes());
  EXPECT_TRUE(prefill.ended.at(sending).status.ok());
  EXPECT_EQ(decode.core.num_open() + prefill.core.num_open() + prefill.core.num_staged(), 0);
}

TEST_F(AgentCoreTest, PullDeliversOnce) {
  TransferId published;
  const std::string handle = publish(5, &published);
  const TransferId first = pull(prefill.address(handle), 5, 1);
  settle();
  EXPECT_TRUE(decode.ended.at(first).status.ok());
  EXPECT_FALSE(decode.ended.at(first).first_token.has_value());
  EXPECT_TRUE(prefill.ended.at(published).status.ok());
  const TransferId second = pull(prefill.address(handle), 5, 1);
  settle();
  EXPECT_EQ(kind_of(decode, second), ErrorKind::kInvalidArgument);
  EXPECT_EQ(decode.ended.at(second).status.error().code, "kv_transfer_consumed");
  EXPECT_EQ(prefill.ended.size(), 1U);
}

TEST_F(AgentCoreTest, ForgedHandlesAndLengthsChangeNothing) {
  TransferId published;
  const std::string handle = publish(5, &published);
  std::string forged = handle;
  forged.back() = forged.back() == '0' ? '1' : '0';
  const TransferId unknown = pull(prefill.address(forged), 5);
  const TransferId longer = pull(prefill.address(handle), 5, 0, 5 * kBlockSize - 1);
  settle();
  EXPECT_EQ(decode.ended.at(unknown).peer, "prefill");
  EXPECT_EQ(decode.ended.at(unknown).status.error().code, "kv_transfer_unknown_handle");
  EXPECT_EQ(decode.ended.at(longer).status.error().code, "kv_transfer_wrong_length");
  const TransferId nonsense = pull(prefill.address("cmpl-123"), 5);
  EXPECT_EQ(decode.ended.at(nonsense).status.error().param, "kv_transfer_params.remote_request_id");
  const TransferId right = pull(prefill.address(handle), 5);
  settle();
  EXPECT_TRUE(decode.ended.at(right).status.ok());

  TransferId receiving;
  std::string reserved = reserve(5, 0, &receiving);
  reserved.back() = reserved.back() == '0' ? '1' : '0';
  const TransferId sending = begin(reserved, 5);
  settle();
  EXPECT_EQ(prefill.ended.at(sending).status.error().code, "kv_transfer_unknown_handle");
  EXPECT_EQ(decode.core.num_open(), 1);
}

TEST_F(AgentCoreTest, AHandleServesOnePeer) {
  FakeNetwork& same = network;
  TestEngine thief(same, clock, 9, "thief", 9);
  TransferId published;
  const std::string handle = publish(5, &published);
  const TransferId first = pull(prefill.address(handle), 5);
  for (int i = 0; i < 8; ++i) network.step();  // under way
  const TransferId stolen = thief.open(true, thief.take(5), std::vector<uint64_t>(5, 0));
  thief.core.pull(stolen, prefill.address(handle), {0, thief.opened.at(stolen).blocks, 5 * kBlockSize}, 0);
  settle();
  EXPECT_TRUE(decode.ended.at(first).status.ok());
  EXPECT_EQ(thief.ended.at(stolen).status.error().code, "kv_transfer_consumed");
}

TEST_F(AgentCoreTest, AbortsReachTheOtherSide) {
  TransferId receiving;
  TransferId sending = begin(reserve(5, 0, &receiving), 5);
  prefill.core.send_blocks(sending, 0, 0, 5);
  settle();
  decode.core.abort(receiving);
  EXPECT_EQ(kind_of(decode, receiving), ErrorKind::kAborted);  // at once: nothing can be in flight into its blocks
  prefill.core.send_blocks(sending, 1, 0, 5);
  settle();
  EXPECT_EQ(kind_of(prefill, sending), ErrorKind::kAborted);
  prefill.core.send_blocks(sending, 2, 0, 5);  // the engine did not know yet
  prefill.core.commit_send(sending, FirstToken{});
  decode.core.abort(receiving);
  settle();
  decode.check_blocks();

  prefill_blocks = prefill.take(5);
  sending = begin(reserve(5, 0, &receiving), 5);
  settle();
  prefill.core.abort(sending);
  EXPECT_EQ(kind_of(prefill, sending), ErrorKind::kAborted);
  settle();
  EXPECT_EQ(kind_of(decode, receiving), ErrorKind::kAborted);

  prefill_blocks = prefill.take(5);  // aborted before prefill came: it is told why
  const std::string handle = reserve(5, 0, &receiving);
  decode.core.abort(receiving);
  sending = begin(handle, 5);
  settle();
  EXPECT_EQ(prefill.ended.at(sending).status.error().code, "kv_transfer_aborted");
  EXPECT_EQ(kind_of(prefill, sending), ErrorKind::kUnavailable);  // its own client is still there
}

TEST_F(AgentCoreTest, LeasesHeartbeatsAndDecline) {
  TransferId published;
  std::string handle = publish(5, &published);
  for (int i = 0; i < 5; ++i) {
    advance(2'500'000);
    decode.core.renew_lease(prefill.address(handle));
    settle();
  }
  EXPECT_EQ(prefill.core.num_open(), 1);
  advance(3'000'000);
  EXPECT_EQ(kind_of(prefill, published), ErrorKind::kDeadlineExceeded);
  const TransferId late = pull(prefill.address(handle), 5);
  settle();
  EXPECT_EQ(kind_of(decode, late), ErrorKind::kUnavailable);
  EXPECT_EQ(decode.ended.at(late).status.error().code, "kv_transfer_expired");

  prefill_blocks = prefill.take(5);
  handle = publish(5, &published);
  decode.core.decline(prefill.address(handle), {1});  // of another prompt
  KvTransferParams forged = prefill.address(handle);
  forged.remote_engine_id = "prefill:8";
  decode.core.decline(forged, {});
  settle();
  EXPECT_EQ(prefill.core.num_open(), 1);
  decode.core.decline(prefill.address(handle), {});
  settle();
  EXPECT_EQ(kind_of(prefill, published), ErrorKind::kAborted);

  // Nor does it end what another request of the same process is fetching.
  prefill_blocks = prefill.take(5);
  handle = publish(5, &published);
  const TransferId fetching = pull(prefill.address(handle), 5);
  decode.core.decline(prefill.address(handle), {});
  settle();
  EXPECT_TRUE(decode.ended.at(fetching).status.ok());
}

// Who has the handle of a publication may end it, at any moment of its life, and nothing else.
TEST_F(AgentCoreTest, AReleaseEndsAPublicationAlsoUnderAReader) {
  TransferId published;
  const std::string unread = publish(5, &published);
  prefill.core.release(make_handle(published.value).to_string());  // another nonce
  prefill.core.release("no handle");
  decode.core.release(unread);
  EXPECT_EQ(prefill.core.num_open(), 1);
  prefill.core.release(unread);
  EXPECT_EQ(kind_of(prefill, published), ErrorKind::kAborted);
  prefill.core.release(unread);
  const TransferId late = pull(prefill.address(unread), 5);
  settle();
  EXPECT_EQ(decode.ended.at(late).status.error().code, "kv_transfer_aborted");

  int num_fetched = 0, num_cut = 0;
  for (int round = 0; round < 200; ++round) {
    SCOPED_TRACE(round);
    prefill_blocks = prefill.take(5);
    const std::string handle = publish(5, &published);
    const TransferId fetching = pull(prefill.address(handle), 5);
    for (int i = 0; i < round % 8; ++i) {
      prefill.core.pump();
      network.step();
    }
    prefill.core.release(handle);
    ASSERT_TRUE(prefill.ended.contains(published));  // at once
    for (const BlockId block : prefill_blocks) {  // their next owner writes at once
      prefill.seeds[block.value] = prefill.next_seed++;
      prefill.memory.fill(block, prefill.seeds[block.value]);
    }
    settle();
    ASSERT_TRUE(decode.ended.contains(fetching));  // with the right bytes, if it ended well
    const bool is_fetched = decode.ended.at(fetching).status.ok();
    ++(is_fetched ? num_fetched : num_cut);
    EXPECT_LE(prefill.ended.at(published).status.ok(), is_fetched);
    EXPECT_EQ(prefill.core.num_open() + decode.core.num_open(), 0);
    EXPECT_EQ(prefill.core.num_staged() + prefill.core.num_lent(), 0);
  }
  EXPECT_GT(num_fetched, 20);
  EXPECT_GT(num_cut, 20);
}

TEST_F(AgentCoreTest, AReleaseEndsNoPush) {
  TransferId receiving;
  const std::string handle = reserve(5, 0, &receiving);
  const TransferId sending = begin(handle, 5);
  prefill.core.release(handle);
  decode.core.release(handle);
  send_all(sending, 5);
  settle();
  EXPECT_TRUE(decode.ended.at(receiving).status.ok());
  EXPECT_TRUE(prefill.ended.at(sending).status.ok());
}

TEST_F(AgentCoreTest, ARestartedPeerIsNamedAndUsableAtOnce) {
  TransferId published;
  const std::string handle = publish(5, &published);
  const KvTransferParams stale = prefill.address(handle);
  const TransferId first = pull(stale, 5);
  settle();
  ASSERT_TRUE(decode.ended.at(first).status.ok());

  // The new incarnation takes the port; decode's old link may not have noticed yet.
  prefill.messenger.reset();
  TestEngine restarted(network, clock, kPrefillPort, "prefill", 3);
  const std::vector<BlockId> blocks = restarted.take(5);
  const TransferId published_again = restarted.open(false, blocks);
  const Handle new_handle = make_handle(1);
  restarted.core.publish(published_again, new_handle, {0, blocks, 5 * kBlockSize});
  const auto settle_new = [&] {
    do {
      while (restarted.core.pump() || decode.core.pump()) {
      }
    } while (network.step());
  };
  const TransferId old_handle = pull(stale, 5);
  const std::vector<BlockId> target = decode.take(5);
  const TransferId fresh = decode.open(true, target, restarted.seeds_of(blocks));
  decode.core.pull(fresh, restarted.address(new_handle.to_string()), {0, target, 5 * kBlockSize}, 0);
  settle_new();
  EXPECT_TRUE(decode.ended.at(fresh).status.ok());
  EXPECT_EQ(kind_of(decode, old_handle), ErrorKind::kUnavailable);

  const TransferId again = pull(stale, 5);  // over the new link
  settle_new();
  EXPECT_EQ(kind_of(decode, again), ErrorKind::kUnavailable);
  EXPECT_THAT(text_of(decode, again), HasSubstr("restarted"));
  EXPECT_THAT(text_of(decode, again), HasSubstr("prefill:3"));
}

// What a client writes into remote_engine_id fails its own request only: the link of the others stays, and is one.
TEST_F(AgentCoreTest, AForgedEngineIdCostsNobodyALink) {
  TransferId receiving;
  const TransferId sending = begin(reserve(5, 0, &receiving), 5);  // runs all the time over prefill's link to decode
  settle();
  for (int i = 0; i < 30; ++i) {
    KvTransferParams forged = decode.address(make_handle(1).to_string());
    forged.remote_engine_id = fmt::format("e{}", i);
    std::vector<TransferId> wrong;
    for (int j = 0; j < 2; ++j) {
      forged.remote_request_id = make_handle(1).to_string();
      wrong.push_back(prefill.open(false, {}));
      prefill.core.begin_send(wrong.back(), forged, {5, {}, 5 * kBlockSize}, 0);
      prefill.core.decline(forged, {});
      prefill.core.renew_lease(forged);
    }
    ASSERT_LE(prefill.core.num_links(), 2);
    // An honest one in the same moment does not wait for the second link.
    const std::vector<BlockId> blocks = prefill.take(1);
    const std::vector<BlockId> target = decode.take(1);
    const TransferId to = decode.open(true, target, prefill.seeds_of(blocks));
    const Handle handle = make_handle(2);
    decode.core.expect(to, handle, {0, target, kBlockSize}, 0);
    const TransferId from = prefill.open(false, blocks);
    prefill.core.begin_send(from, decode.address(handle.to_string()), {0, blocks, kBlockSize}, 0);
    for (int64_t layer = 0; layer < 3; ++layer) prefill.core.send_blocks(from, layer, 0, 1);
    prefill.core.commit_send(from, FirstToken{});
    settle();
    ASSERT_TRUE(prefill.ended.at(from).status.ok());
    for (const TransferId id : wrong) {
      ASSERT_EQ(kind_of(prefill, id), ErrorKind::kUnavailable);
      ASSERT_THAT(text_of(prefill, id), HasSubstr("decode:2 answers instead of e"));
    }
    ASSERT_LE(prefill.core.next_timer_us(), clock.now_us());
    advance(0);
    ASSERT_EQ(prefill.core.num_links(), 1);
    ASSERT_EQ(decode.core.num_links(), 1);
  }
  send_all(sending, 5);
  settle();
  EXPECT_TRUE(decode.ended.at(receiving).status.ok());
  EXPECT_GT(prefill.core.next_timer_us(), clock.now_us());
}

// The address has moved to another process, but the old one still works: its link lasts as long as its transfers.
TEST_F(AgentCoreTest, ADisplacedLinkClosesWithItsLastTransfer) {
  TransferId receiving;
  const TransferId sending = begin(reserve(5, 0, &receiving), 5);
  settle();
  TestEngine successor(network, clock, 9, "decode", 4);
  network.redirect(kDecodePort, 9);
  const std::vector<BlockId> target = successor.take(5);
  const TransferId to = successor.open(true, target, prefill.seeds_of(prefill_blocks));
  const Handle handle = make_handle(2);
  successor.core.expect(to, handle, {0, target, 5 * kBlockSize}, 0);
  KvTransferParams remote = decode.address(handle.to_string());
  remote.remote_engine_id = successor.engine_id;
  const TransferId from = prefill.open(false, {});
  prefill.core.begin_send(from, remote, {0, prefill_blocks, 5 * kBlockSize}, 0);
  send_all(from, 5);
  settle();
  EXPECT_TRUE(prefill.ended.at(from).status.ok());
  advance(0);
  EXPECT_EQ(prefill.core.num_links(), 2);
  EXPECT_GT(prefill.core.next_timer_us(), clock.now_us());
  send_all(sending, 5);
  settle();
  EXPECT_TRUE(prefill.ended.at(sending).status.ok());
  advance(0);
  EXPECT_EQ(prefill.core.num_links(), 1);
  EXPECT_EQ(decode.core.num_links(), 0);
  EXPECT_EQ(successor.core.num_links(), 1);
}

TEST_F(AgentCoreTest, LossOfThePeerEndsItsTransfers) {
  TransferId receiving;
  const TransferId sending = begin(reserve(5, 0, &receiving), 5);
  prefill.core.send_blocks(sending, 0, 0, 5);
  settle();
  network.cut_one();
  settle();
  EXPECT_EQ(kind_of(decode, receiving), ErrorKind::kUnavailable);
  EXPECT_THAT(text_of(decode, receiving), HasSubstr("prefill:1"));
  EXPECT_EQ(kind_of(prefill, sending), ErrorKind::kUnavailable);
  EXPECT_THAT(text_of(prefill, sending), HasSubstr("decode:2"));
  EXPECT_EQ(prefill.core.num_links() + decode.core.num_links(), 0);
}

TEST_F(AgentCoreTest, AnUnreachablePeerIsNamed) {
  KvTransferParams nowhere = prefill.address(make_handle(1).to_string());
  nowhere.remote_port = 77;
  const TransferId id = pull(nowhere, 5);
  settle();
  EXPECT_EQ(kind_of(decode, id), ErrorKind::kUnavailable);
  EXPECT_THAT(text_of(decode, id), HasSubstr("127.0.0.1:77"));
}

TEST_F(AgentCoreTest, ASilentPeerIsGivenUp) {
  TransferId receiving;
  const TransferId sending = begin(reserve(5, 0, &receiving), 5);
  settle();
  clock.advance_us(1'000'000);  // prefill is frozen: no step of its own
  decode.core.run_timers();
  EXPECT_EQ(kind_of(decode, receiving), ErrorKind::kUnavailable);
  EXPECT_EQ(decode.core.num_links(), 0);  // the next transfer makes a new connection
  settle();
  EXPECT_NE(prefill.ended.find(sending), prefill.ended.end());
}

TEST_F(AgentCoreTest, DeadlinesBoundEveryWait) {
  TransferId receiving;
  reserve(5, 0, &receiving, 2'000'000);
  advance(1'999'999);
  EXPECT_EQ(decode.core.num_open(), 1);  // longer than the idle time-out: prefill may queue
  advance(1);
  EXPECT_EQ(kind_of(decode, receiving), ErrorKind::kDeadlineExceeded);

  const TransferId sending = begin(reserve(5, 0, &receiving, clock.now_us() + 2'000'000), 5, clock.now_us() + 900'000);
  settle();
  for (int i = 0; i < 9; ++i) advance(100'000);
  EXPECT_EQ(kind_of(prefill, sending), ErrorKind::kDeadlineExceeded);
  EXPECT_FALSE(decode.ended.at(receiving).status.ok());
}

// Found by `tandem sim --seed 1759`: it was told that the handle was used before, as a fault of the request.
TEST_F(AgentCoreTest, ALatePrefillHearsThatItsReservationExpired) {
  TransferId receiving;
  const std::string handle = reserve(5, 0, &receiving);
  advance(AgentOptions().idle_timeout_us);
  EXPECT_EQ(kind_of(decode, receiving), ErrorKind::kUnavailable);
  const TransferId sending = begin(handle, 5);
  settle();
  EXPECT_EQ(kind_of(prefill, sending), ErrorKind::kUnavailable);
  EXPECT_EQ(prefill.ended.at(sending).status.error().code, "kv_transfer_expired");
}

TEST_F(AgentCoreTest, HeartbeatsCarryASlowPrefill) {
  TransferId receiving;
  const TransferId sending = begin(reserve(5, 0, &receiving), 5);
  settle();
  for (int i = 0; i < 100; ++i) advance(100'000);  // ten idle time-outs
  EXPECT_EQ(decode.core.num_open(), 1);
  send_all(sending, 5);
  settle();
  EXPECT_TRUE(decode.ended.at(receiving).status.ok());
}

TEST_F(AgentCoreTest, IncompatiblePeersAreRefusedWithBothValues) {
  AgentOptions other = TestEngine::default_options();
  other.model_fingerprint = "model-b";
  TestEngine stranger(network, clock, 9, "stranger", 9, other);
  const TransferId id = pull(stranger.address(make_handle(1).to_string()), 5);
  settle();
  EXPECT_EQ(kind_of(decode, id), ErrorKind::kUnsupported);
  EXPECT_THAT(text_of(decode, id), testing::AllOf(HasSubstr("model-a"), HasSubstr("model-b")));

  TestEngine wide(network, clock, 10, "wide", 10, TestEngine::default_options(), make_layout(3, 4, 32));
  const TransferId layout = pull(wide.address(make_handle(1).to_string()), 5);
  settle();
  EXPECT_EQ(kind_of(decode, layout), ErrorKind::kUnsupported);
  EXPECT_THAT(text_of(decode, layout), testing::AllOf(HasSubstr("24 B"), HasSubstr("32 B")));
  advance(2'000'000);
  EXPECT_EQ(decode.core.num_links() + wide.core.num_links() + stranger.core.num_links(), 0);
}

TEST_F(AgentCoreTest, GarbageIsRefusedAndHarmsNobody) {
  TransferId receiving;
  const TransferId sending = begin(reserve(5, 0, &receiving), 5);
  settle();
  class Silent final : public comm::MessageHandler {
    void on_accept(comm::ConnectionId) override {}
    void on_message(comm::ConnectionId, std::span<const std::byte> bytes, std::span<const std::byte>) override {
      last = transfer::decode(bytes).value();
    }
    void on_sent(comm::ConnectionId, uint64_t) override {}
    void on_closed(comm::ConnectionId, const Error&) override { ++closed; }

   public:
    std::optional<Message> last;
    int closed = 0;
  };
  Silent hostile;
  const std::unique_ptr<FakeNetwork::Node> node = network.add_node(66, hostile);
  std::vector<std::vector<std::byte>> attacks = {
      {}, std::vector<std::byte>(3), std::vector<std::byte>(500, std::byte{0xff})};
  attacks[0] = encode(Begin{make_handle(1), 20, 0, 0});  // before hello
  attacks.push_back(encode(Ack{make_handle(1), 5}));
  attacks.back()[2] = std::byte{7};  // another version
  for (const std::vector<std::byte>& attack : attacks) {
    const comm::ConnectionId id = node->connect("", kDecodePort).value();
    (void)node->send(id, attack, {}, 0);
    settle();
    ASSERT_TRUE(hostile.last.has_value());
    EXPECT_TRUE(std::holds_alternative<Refuse>(*hostile.last));
    const int closed = hostile.closed;
    for (int i = 0; i < 12; ++i) advance(100'000);
    EXPECT_EQ(hostile.closed, closed + 1);
  }
  const comm::ConnectionId mute = node->connect("", kDecodePort).value();
  const int closed = hostile.closed;
  for (int i = 0; i < 6; ++i) advance(100'000);
  EXPECT_EQ(hostile.closed, closed + 1);  // no hello within the connect time-out
  EXPECT_EQ(node->send(mute, attacks[0], {}, 0), comm::SendResult::kClosed);
  send_all(sending, 5);
  settle();
  EXPECT_TRUE(decode.ended.at(receiving).status.ok());
}

// --- random ---

// Two prefill and two decode engines under random work and faults.
class Storm {
 public:
  Storm(uint64_t seed, const NetworkFaults& faults, bool kill) : random_(seed), network_(random_, faults), kill_(kill) {
    for (size_t i = 0; i < kEngines; ++i) start(i);
  }
  ~Storm() {
    for (auto& engine : engines_) engine->messenger.reset();
  }

  void run(int steps) {
    for (int i = 0; i < steps && !testing::Test::HasFatalFailure(); ++i) {
      act();
      for (uint64_t n = random_() % 8; n > 0; --n) network_.step();
      for (auto& engine : engines_) engine->core.pump();
      if (i % 16 == 0) check();
    }
    quiesce();
  }
  int64_t num_ok = 0;
  int64_t num_failed = 0;

 private:
  static constexpr size_t kEngines = 4;  // 0, 1 prefill; 2, 3 decode

  // A prompt being computed by a prefill engine: chunks in order, in each all layers in order.
  struct Prompt {
    size_t engine;
    TransferId id;
    int64_t num_blocks;
    int64_t done_blocks = 0;
    int64_t chunk = 0;
    int64_t layer = 0;
  };

  void start(size_t index) {
    const int64_t port = static_cast<int64_t>(index) + 1;
    engines_[index] =
        std::make_unique<TestEngine>(network_, clock_, port, index < 2 ? "prefill" : "decode", ++incarnation_);
  }
  TestEngine& pick(size_t first) { return *engines_[first + random_() % 2]; }

  void act() {
    switch (random_() % 12) {
      case 0:
      case 1:
        return push();
      case 2:
      case 3:
        return publish_and_pull();
      case 4:
      case 5:
      case 6:
      case 7:
        return compute();
      case 8:
        if (random_() % 3 == 0) abort_one();
        return;
      case 9:
        clock_.advance_us(static_cast<int64_t>(random_() % 60'000));
        for (auto& engine : engines_) engine->core.run_timers();
        return;
      case 10:
        if (random_() % 20 == 0) network_.cut_one();
        return;
      default:
        if (kill_ && random_() % 100 == 0) restart(random_() % kEngines);
    }
  }

  void push() {
    const size_t p = random_() % 2;
    TestEngine& prefill = *engines_[p];
    TestEngine& decode = pick(2);
    const int64_t count = 1 + static_cast<int64_t>(random_() % 5);
    const int64_t cached =
        static_cast<int64_t>(random_()) & 1 ? 0 : static_cast<int64_t>(random_() % static_cast<uint64_t>(count));
    const int64_t tokens = count * kBlockSize - static_cast<int64_t>(random_() % kBlockSize);
    const std::vector<BlockId> source = prefill.take(count);
    const std::vector<BlockId> target = decode.take(count - cached);
    if (source.empty() || target.empty()) {
      prefill.free.insert(prefill.free.end(), source.begin(), source.end());
      decode.free.insert(decode.free.end(), target.begin(), target.end());
      return;
    }
    std::vector<uint64_t> expected = prefill.seeds_of(source);
    expected.erase(expected.begin(), expected.begin() + cached);
    const TransferId receiving = decode.open(true, target, expected);
    const Handle handle = make_handle(receiving.value);
    decode.core.expect(receiving, handle, {cached, target, tokens}, clock_.now_us() + 2'000'000);
    const TransferId sending = prefill.open(false, source);
    prefill.core.begin_send(sending, decode.address(handle.to_string()), {0, source, tokens},
                            clock_.now_us() + 2'000'000);
    prompts_.push_back({p, sending, count});
  }

  void publish_and_pull() {
    TestEngine& prefill = pick(0);
    const int64_t count = 1 + static_cast<int64_t>(random_() % 5);
    const std::vector<BlockId> source = prefill.take(count);
    if (source.empty()) return;
    const TransferId published = prefill.open(false, source);
    const Handle handle = make_handle(published.value);
    prefill.opened.at(published).handle = handle;
    prefill.core.publish(published, handle, {0, source, count * kBlockSize});
    const int pullers = static_cast<int>(random_() % 4);  // none, one, or wrongly more
    for (int i = 0; i < std::max(1, pullers - 1) && pullers > 0; ++i) {
      TestEngine& decode = pick(2);
      const std::vector<BlockId> target = decode.take(count);
      if (target.empty()) continue;
      const TransferId id = decode.open(true, target, prefill.seeds_of(source));
      const int64_t tokens = count * kBlockSize - (random_() % 10 == 0 ? 1 : 0);
      decode.core.pull(id, prefill.address(handle.to_string()), {0, target, tokens}, clock_.now_us() + 2'000'000);
    }
  }

  void compute() {
    if (prompts_.empty()) return;
    const size_t index = random_() % prompts_.size();
    Prompt& prompt = prompts_[index];
    AgentCore& core = engines_[prompt.engine]->core;
    if (prompt.chunk == 0) {
      prompt.chunk =
          1 + static_cast<int64_t>(random_() % static_cast<uint64_t>(prompt.num_blocks - prompt.done_blocks));
    }
    core.send_blocks(prompt.id, prompt.layer, prompt.done_blocks, prompt.chunk);
    if (++prompt.layer < 3) return;
    prompt.layer = 0;
    prompt.done_blocks += std::exchange(prompt.chunk, 0);
    if (prompt.done_blocks < prompt.num_blocks) return;
    core.commit_send(prompt.id, FirstToken{1, 0, {}, 0});
    prompts_.erase(prompts_.begin() + static_cast<ptrdiff_t>(index));
  }

  void abort_one() {
    TestEngine& engine = *engines_[random_() % kEngines];
    if (engine.opened.empty()) return;
    auto chosen = engine.opened.begin();
    std::advance(chosen, static_cast<ptrdiff_t>(random_() % engine.opened.size()));
    if (random_() % 2 == 0) return engine.core.release(chosen->second.handle.to_string());  // a publication, or nothing
    engine.core.abort(chosen->first);
  }

  // The process dies and comes back with an empty memory.
  void restart(size_t index) {
    std::erase_if(prompts_, [&](const Prompt& prompt) { return prompt.engine == index; });
    engines_[index]->messenger.reset();
    engines_[index].reset();
    start(index);
  }

  void check() {
    for (auto& engine : engines_) engine->check_blocks();
  }

  // No new work: everything ends, within bounded time, exactly once, and nothing is left.
  void quiesce() {
    for (int i = 0; i < 300; ++i) {
      do {
        for (auto& engine : engines_) {
          while (engine->core.pump()) {
          }
        }
      } while (network_.step());
      clock_.advance_us(20'000);
      for (auto& engine : engines_) engine->core.run_timers();
    }
    check();
    for (auto& engine : engines_) {
      EXPECT_EQ(engine->core.num_open(), 0);
      EXPECT_EQ(engine->core.num_staged(), 0);
      EXPECT_EQ(engine->opened.size(), 0U);
      EXPECT_EQ(std::ssize(engine->ended), engine->num_opened);
      EXPECT_EQ(engine->free.size(), static_cast<size_t>(kNumBlocks));
      for (const auto& [id, done] : engine->ended) ++(done.status.ok() ? num_ok : num_failed);
    }
  }

  std::mt19937_64 random_;
  FakeNetwork network_;
  const bool kill_;
  ManualClock clock_;
  uint64_t incarnation_ = 0;
  std::array<std::unique_ptr<TestEngine>, kEngines> engines_;
  std::vector<Prompt> prompts_;
};

void run_storms(int count, int steps, const NetworkFaults& faults, bool kill) {
  init_log(LogLevel::kError, "");
  int64_t ok = 0;
  int64_t failed = 0;
  for (int i = 0; i < count; ++i) {
    const uint64_t seed = kFirstSeed + static_cast<uint64_t>(i);
    Storm storm(seed, faults, kill);
    storm.run(steps);
    ok += storm.num_ok;
    failed += storm.num_failed;
    if (testing::Test::HasFailure()) {
      std::printf("failing seed %lu\n", static_cast<unsigned long>(seed));
      break;
    }
  }
  std::printf("seeds %lu + %d: %ld ended well, %ld with an error\n", static_cast<unsigned long>(kFirstSeed), count,
              static_cast<long>(ok), static_cast<long>(failed));
  init_log(LogLevel::kInfo, "");
  EXPECT_GT(ok, count);  // the storm lets something through
}

TEST(AgentStorm, AbortsAndCuts) { run_storms(60, 1500, {}, false); }
TEST(AgentStorm, Restarts) { run_storms(40, 1500, {}, true); }
TEST(AgentStorm, ReorderRepeatDropDamage) { run_storms(60, 1500, {0.2, 0.02, 0.003, 0.005}, true); }

}  // namespace
}  // namespace tandem::transfer
