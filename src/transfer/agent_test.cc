// Real agents over every transport: two in this process, and this process with children that are killed, frozen and restarted.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>

#include "src/base/clock.h"
#include "src/transfer/test_peer.h"
#include "src/transfer/test_support.h"

namespace tandem::transfer {
namespace {

using testing::HasSubstr;

constexpr uint64_t kChildSeed = 1000;

class AgentTest : public testing::TestWithParam<comm::Transport> {
 protected:
  static AgentOptions options(const std::string& engine_id) { return make_options(engine_id, GetParam()); }
  static int64_t blocks_of(int64_t tokens) { return (tokens + 15) / 16; }
  static ErrorKind kind_of(const std::optional<Done>& done) {
    EXPECT_TRUE(done.has_value());
    return !done.has_value() || done->status.ok() ? ErrorKind::kInternal : done->status.error().kind;
  }
  static std::string push_command(LocalPeer& to, const std::string& handle, int64_t tokens, int64_t pause_us) {
    return fmt::format("push {} {} {} {} {}", handle, to.agent().engine_id(), to.agent().port(), tokens, pause_us);
  }
  // Until the first block of a child's slow push is there. Before its first message a sender is not known here, and its
  // death is none of the receiver's business.
  void wait_for_first_block(LocalPeer& decode) {
    const int64_t limit_us = clock.now_us() + 30'000'000;
    while (!decode.holds(BlockId(0), kChildSeed)) {
      ASSERT_LT(clock.now_us(), limit_us);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  SteadyClock clock;
};

TEST_P(AgentTest, PushesLayersAndChunksInOneProcess) {
  LocalPeer prefill(options("prefill"), peer_layout(), 256);
  LocalPeer decode(options("decode"), peer_layout(), 256);
  for (int32_t i = 0; i < 256; ++i) prefill.fill(BlockId(i), 500 + static_cast<uint64_t>(i));
  for (int32_t i = 0; i < 256; ++i) decode.fill(BlockId(i), 900 + static_cast<uint64_t>(i));
  constexpr int64_t kTokens = 100 * 16 - 3;
  std::vector<BlockId> source = first_blocks(100);
  std::vector<BlockId> target = first_blocks(100, 50);
  std::mt19937_64 random(kFirstSeed);
  std::shuffle(source.begin(), source.end(), random);
  std::shuffle(target.begin(), target.end(), random);
  const std::vector<BlockId> wanted(target.begin() + 10, target.end());  // the first 10 are in decode's prefix cache

  const TransferId receiving = decode.next_id();
  const std::string handle = decode.agent().expect(receiving, {10, wanted, kTokens}, clock.now_us() + 20'000'000);
  const TransferId sending = prefill.next_id();
  prefill.agent().begin_send(sending, decode.address(handle), {0, source, kTokens}, clock.now_us() + 20'000'000);
  for (int64_t first = 0; first < 100; first += 30) {
    for (int64_t layer = 0; layer < 4; ++layer) {
      prefill.agent().send_blocks(sending, layer, first, std::min<int64_t>(30, 100 - first));
    }
  }
  EXPECT_FALSE(decode.wait_done(receiving, 50'000).has_value());  // never before the commit
  prefill.agent().commit_send(sending, FirstToken{42, -0.25F, {{42, -0.25F}, {1, -2.0F}}, 16});
  const std::optional<Done> received = decode.wait_done(receiving);
  const std::optional<Done> sent = prefill.wait_done(sending);
  ASSERT_TRUE(received.has_value() && received->status.ok());
  ASSERT_TRUE(sent.has_value() && sent->status.ok());
  EXPECT_EQ(received->first_token->token, 42);
  EXPECT_EQ(received->first_token->logprob, -0.25F);
  EXPECT_EQ(received->first_token->top_logprobs.size(), 2U);
  EXPECT_EQ(received->bytes, 90 * peer_layout().total_block_bytes());
  EXPECT_EQ(sent->bytes, received->bytes);
  for (size_t i = 10; i < 100; ++i) {
    ASSERT_TRUE(decode.holds(target[i], 500 + static_cast<uint64_t>(source[i].value))) << i;
  }
  for (int32_t i = 0; i < 256; ++i) {  // all others are as they were
    if (std::find(wanted.begin(), wanted.end(), BlockId(i)) == wanted.end()) {
      ASSERT_TRUE(decode.holds(BlockId(i), 900 + static_cast<uint64_t>(i)));
    }
    ASSERT_TRUE(prefill.holds(BlockId(i), 500 + static_cast<uint64_t>(i)));
  }
  EXPECT_EQ(decode.agent().num_open() + prefill.agent().num_open(), 0);
}

TEST_P(AgentTest, PushesAndPullsBetweenProcesses) {
  LocalPeer local(options("local"), peer_layout(), kPeerBlocks);
  ChildPeer child("child", GetParam());
  for (const int64_t tokens : {int64_t{1}, int64_t{16}, int64_t{17}, int64_t{2000}, int64_t{30'000}}) {
    const int64_t count = blocks_of(tokens);
    const TransferId pulling = local.next_id();
    local.agent().pull(pulling, child.address(child.ask(fmt::format("publish {}", tokens))),
                       {0, first_blocks(count), tokens}, 0);
    const std::optional<Done> pulled = local.wait_done(pulling);
    ASSERT_TRUE(pulled.has_value() && pulled->status.ok());
    EXPECT_EQ(child.ask("wait"), "ok");
    for (int32_t i = 0; i < count; ++i) ASSERT_TRUE(local.holds(BlockId(i), kChildSeed + static_cast<uint64_t>(i)));

    for (int32_t i = 0; i < count; ++i) local.fill(BlockId(i), 1);
    const TransferId receiving = local.next_id();
    const std::string handle = local.agent().expect(receiving, {0, first_blocks(count), tokens}, 0);
    ASSERT_EQ(child.ask(push_command(local, handle, tokens, 0)), "started");
    const std::optional<Done> received = local.wait_done(receiving);
    ASSERT_TRUE(received.has_value() && received->status.ok());
    EXPECT_EQ(received->first_token->token, 11);
    EXPECT_EQ(child.ask("wait"), "ok");
    for (int32_t i = 0; i < count; ++i) ASSERT_TRUE(local.holds(BlockId(i), kChildSeed + static_cast<uint64_t>(i)));
  }
}

TEST_P(AgentTest, MismatchIsRefusedWithBothValues) {
  LocalPeer decode(options("decode"), peer_layout(), 16);
  AgentOptions other_model = options("other");
  other_model.model_fingerprint = "model-b";
  LocalPeer model(other_model, peer_layout(), 16);
  TransferId id = decode.next_id();
  decode.agent().pull(id, model.address(model.agent().publish(model.next_id(), {0, first_blocks(1), 16})),
                      {0, first_blocks(1), 16}, 0);
  std::optional<Done> done = decode.wait_done(id);
  EXPECT_EQ(kind_of(done), ErrorKind::kUnsupported);
  EXPECT_THAT(done->status.error().message, testing::AllOf(HasSubstr("model-a"), HasSubstr("model-b")));

  model::KvLayout layout = peer_layout();
  layout.dtype = kernels::DType::kF32;
  layout.bytes_per_token = 1024;
  LocalPeer wide(options("wide"), layout, 16);
  id = decode.next_id();
  decode.agent().pull(id, wide.address(wide.agent().publish(wide.next_id(), {0, first_blocks(1), 16})),
                      {0, first_blocks(1), 16}, 0);
  done = decode.wait_done(id);
  EXPECT_EQ(kind_of(done), ErrorKind::kUnsupported);
  EXPECT_THAT(done->status.error().message, testing::AllOf(HasSubstr("512 B bf16"), HasSubstr("1024 B f32")));
}

TEST_P(AgentTest, AHandleWorksOnce) {
  LocalPeer local(options("local"), peer_layout(), kPeerBlocks);
  ChildPeer child("child", GetParam());
  const std::string handle = child.ask("publish 160");
  for (const bool first : {true, false}) {
    const TransferId id = local.next_id();
    local.agent().pull(id, child.address(handle), {0, first_blocks(10), 160}, 0);
    const std::optional<Done> done = local.wait_done(id);
    ASSERT_TRUE(done.has_value());
    EXPECT_EQ(done->status.ok(), first);
    if (!first) {
      EXPECT_EQ(done->status.error().code, "kv_transfer_consumed");
    }
  }
}

TEST_P(AgentTest, AKilledSenderIsNoticed) {
  LocalPeer decode(options("decode"), peer_layout(), kPeerBlocks);
  for (int round = 0; round < 3; ++round) {
    ChildPeer child("prefill", GetParam());
    const TransferId id = decode.next_id();
    const std::string handle = decode.agent().expect(id, {0, first_blocks(1600), 25'600}, clock.now_us() + 60'000'000);
    decode.fill(BlockId(0), 1);
    ASSERT_EQ(child.ask(push_command(decode, handle, 25'600, 20'000)), "started");
    wait_for_first_block(decode);
    EXPECT_FALSE(decode.wait_done(id, 1'000).has_value());
    child.kill_now();
    const int64_t start_us = clock.now_us();
    const std::optional<Done> done = decode.wait_done(id);
    std::printf("noticed after %ld us\n", static_cast<long>(clock.now_us() - start_us));
    EXPECT_EQ(kind_of(done), ErrorKind::kUnavailable);
    EXPECT_THAT(done->status.error().message, HasSubstr("prefill:"));
    EXPECT_LT(clock.now_us() - start_us, 3'000'000);
    EXPECT_EQ(decode.agent().num_open(), 0);
  }
}

TEST_P(AgentTest, AKilledReceiverIsNoticed) {
  LocalPeer prefill(options("prefill"), peer_layout(), kPeerBlocks);
  ChildPeer child("decode", GetParam());
  const std::string handle = child.ask("expect 25600");
  const TransferId id = prefill.next_id();
  prefill.agent().begin_send(id, child.address(handle), {0, first_blocks(1600), 25'600}, 0);
  prefill.agent().send_blocks(id, 0, 0, 1600);
  EXPECT_FALSE(prefill.wait_done(id, 100'000).has_value());
  child.kill_now();
  const int64_t start_us = clock.now_us();
  const std::optional<Done> done = prefill.wait_done(id);
  EXPECT_EQ(kind_of(done), ErrorKind::kUnavailable);
  EXPECT_THAT(done->status.error().message, HasSubstr("decode:"));
  EXPECT_LT(clock.now_us() - start_us, 3'000'000);
}

// A sender that dies while it writes into shared memory leaves its queue stuck; nobody else may feel it.
TEST_P(AgentTest, ADyingSenderHarmsNoOther) {
  LocalPeer decode(options("decode"), peer_layout(), kPeerBlocks);
  ChildPeer healthy("healthy", GetParam());
  for (int round = 0; round < 4; ++round) {
    ChildPeer doomed("doomed", GetParam());
    const TransferId first = decode.next_id();  // so that the connection stands
    ASSERT_EQ(doomed.ask(push_command(decode, decode.agent().expect(first, {0, first_blocks(1), 16}, 0), 16, 0)),
              "started");
    ASSERT_TRUE(decode.wait_done(first).has_value());
    const TransferId lost = decode.next_id();
    const TransferId kept = decode.next_id();
    const std::string lost_handle = decode.agent().expect(lost, {0, first_blocks(1000), 16'000}, 0);
    const std::string kept_handle = decode.agent().expect(kept, {0, first_blocks(1000, 1000), 16'000}, 0);
    ASSERT_EQ(healthy.ask(push_command(decode, kept_handle, 16'000, 3'000)), "started");
    ASSERT_EQ(doomed.ask(push_command(decode, lost_handle, 16'000, 0)), "started");
    std::this_thread::sleep_for(std::chrono::microseconds(1500 * (round + 1)));  // in mid-write, with luck
    doomed.kill_now();
    const std::optional<Done> done = decode.wait_done(kept);
    ASSERT_TRUE(done.has_value() && done->status.ok());
    EXPECT_EQ(healthy.ask("wait"), "ok");
    for (int32_t i = 0; i < 1000; ++i) {
      ASSERT_TRUE(decode.holds(BlockId(1000 + i), kChildSeed + static_cast<uint64_t>(i)));
    }
    const std::optional<Done> end = decode.wait_done(lost);
    ASSERT_TRUE(end.has_value());
    std::printf("the dying one got %ld of %ld bytes through\n", static_cast<long>(end->bytes),
                static_cast<long>(1000 * peer_layout().total_block_bytes()));
  }
}

// A frozen sender is given up after the idle time-out, or at once by abort; when it goes on, its late data lands
// nowhere.
TEST_P(AgentTest, AFrozenSenderCanNeverWriteLater) {
  LocalPeer decode(options("decode"), peer_layout(), kPeerBlocks);
  ChildPeer child("prefill", GetParam());
  for (const bool by_abort : {true, false}) {
    const TransferId id = decode.next_id();
    const std::string handle = decode.agent().expect(id, {0, first_blocks(1600), 25'600}, 0);
    decode.fill(BlockId(0), 1);
    ASSERT_EQ(child.ask(push_command(decode, handle, 25'600, 20'000)), "started");
    wait_for_first_block(decode);
    EXPECT_FALSE(decode.wait_done(id, 1'000).has_value());
    child.signal(SIGSTOP);
    const int64_t start_us = clock.now_us();
    if (by_abort) decode.agent().abort(id);
    const std::optional<Done> done = decode.wait_done(id);
    EXPECT_EQ(kind_of(done), by_abort ? ErrorKind::kAborted : ErrorKind::kUnavailable);
    EXPECT_LT(clock.now_us() - start_us, by_abort ? 500'000 : 3'000'000);
    for (int32_t i = 0; i < 1600; ++i) decode.fill(BlockId(i), 77);  // the next owner
    child.signal(SIGCONT);
    EXPECT_NE(child.ask("wait"), "ok");
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    for (int32_t i = 0; i < 1600; ++i) ASSERT_TRUE(decode.holds(BlockId(i), 77));
  }
}

TEST_P(AgentTest, AFrozenReceiverIsGivenUp) {
  LocalPeer prefill(options("prefill"), peer_layout(), kPeerBlocks);
  ChildPeer child("decode", GetParam());
  const TransferId id = prefill.next_id();
  const std::string handle = child.ask("expect 25600");
  prefill.agent().begin_send(id, child.address(handle), {0, first_blocks(1600), 25'600}, 0);
  EXPECT_FALSE(prefill.wait_done(id, 50'000).has_value());
  child.signal(SIGSTOP);
  for (int64_t layer = 0; layer < 4; ++layer) prefill.agent().send_blocks(id, layer, 0, 1600);
  prefill.agent().commit_send(id, FirstToken{});
  const int64_t start_us = clock.now_us();
  EXPECT_EQ(kind_of(prefill.wait_done(id)), ErrorKind::kUnavailable);
  EXPECT_LT(clock.now_us() - start_us, 4'000'000);
  const int64_t stop_us = clock.now_us();
  prefill.stop();
  EXPECT_LT(clock.now_us() - stop_us, 1'000'000);
  child.signal(SIGCONT);
}

// The sender ends the transfer while the receiver is stopped with everything on its way, even the commit; its blocks are
// somebody else's at once. When the receiver goes on, it must not take what it finds there for the prompt's.
TEST_P(AgentTest, AStoppedReceiverNeverCountsWhatWasOverwritten) {
  LocalPeer prefill(options("prefill"), peer_layout(), kPeerBlocks);
  ChildPeer child("decode", GetParam());
  constexpr int64_t kBlocks = 200;
  for (int round = 0; round < 5; ++round) {
    for (int32_t i = 0; i < kBlocks; ++i) prefill.fill(BlockId(i), kChildSeed + static_cast<uint64_t>(i));
    const std::string handle = child.ask(fmt::format("expect {}", kBlocks * 16));
    const TransferId id = prefill.next_id();
    prefill.agent().begin_send(id, child.address(handle), {0, first_blocks(kBlocks), kBlocks * 16}, 0);
    EXPECT_FALSE(prefill.wait_done(id, 50'000).has_value());  // accepted
    child.signal(SIGSTOP);
    for (int64_t layer = 0; layer < 4; ++layer) prefill.agent().send_blocks(id, layer, 0, kBlocks);
    prefill.agent().commit_send(id, FirstToken{});
    EXPECT_FALSE(prefill.wait_done(id, 20'000).has_value());
    prefill.agent().abort(id);
    const int64_t start_us = clock.now_us();
    EXPECT_EQ(kind_of(prefill.wait_done(id)), ErrorKind::kAborted);
    EXPECT_LT(clock.now_us() - start_us, 500'000);
    for (int32_t i = 0; i < kBlocks; ++i) prefill.fill(BlockId(i), 77);
    child.signal(SIGCONT);
    const std::string end = child.ask("wait");
    if (end == "ok") {  // all of it had left this process before
      EXPECT_EQ(child.ask(fmt::format("check {}", kBlocks * 16)), "equal");
    } else {
      EXPECT_EQ(end, "aborted");
    }
  }
}

// Its queue is full of messages that nobody will ever read; its death must be told all the same, by the socket and long
// before the idle time-out of 2 s.
TEST_P(AgentTest, AReceiverKilledWithAFullQueueIsNoticed) {
  LocalPeer prefill(options("prefill"), peer_layout(), kPeerBlocks);
  ChildPeer child("decode", GetParam());
  const TransferId id = prefill.next_id();
  const std::string handle = child.ask("expect 25600");
  prefill.agent().begin_send(id, child.address(handle), {0, first_blocks(1600), 25'600}, 0);
  EXPECT_FALSE(prefill.wait_done(id, 50'000).has_value());
  child.signal(SIGSTOP);
  for (int64_t layer = 0; layer < 4; ++layer) prefill.agent().send_blocks(id, layer, 0, 1600);
  EXPECT_FALSE(prefill.wait_done(id, 200'000).has_value());
  child.kill_now();
  const int64_t start_us = clock.now_us();
  EXPECT_EQ(kind_of(prefill.wait_done(id)), ErrorKind::kUnavailable);
  const int64_t noticed_us = clock.now_us() - start_us;
  std::printf("noticed after %ld us\n", static_cast<long>(noticed_us));
  EXPECT_LT(noticed_us, 1'500'000);
}

TEST_P(AgentTest, ARestartedPeerOnTheSamePortIsUsableAtOnce) {
  LocalPeer decode(options("decode"), peer_layout(), 64);
  auto child = std::make_unique<ChildPeer>("prefill", GetParam());
  const int64_t port = child->port();
  KvTransferParams stale;
  for (int round = 0; round < 4; ++round) {
    const KvTransferParams remote = child->address(child->ask("publish 160"));
    EXPECT_EQ(remote.remote_port, port);
    const TransferId id = decode.next_id();
    decode.agent().pull(id, remote, {0, first_blocks(10), 160}, 0);
    const std::optional<Done> done = decode.wait_done(id);
    ASSERT_TRUE(done.has_value());
    ASSERT_TRUE(done->status.ok()) << done->status.error().message;
    if (round > 0) {
      const TransferId old = decode.next_id();
      decode.agent().pull(old, stale, {0, first_blocks(10, 20), 160}, 0);
      const std::optional<Done> refused = decode.wait_done(old);
      EXPECT_EQ(kind_of(refused), ErrorKind::kUnavailable);
      EXPECT_THAT(refused->status.error().message, HasSubstr("restarted"));
    }
    stale = child->address(child->ask("publish 160"));
    child->kill_now();
    child.reset();
    child = std::make_unique<ChildPeer>("prefill", GetParam(), port);
  }
}

// Blocks that are freed by Done get their next owner's bytes at once; nothing may change them after that.
TEST_P(AgentTest, AbortStormLeavesNoForeignBytes) {
  constexpr int kRounds = 400;
  constexpr int64_t kTokens = 25 * 16;
  LocalPeer prefill(options("prefill"), peer_layout(), 256);
  LocalPeer decode(options("decode"), peer_layout(), 256);
  for (int32_t i = 0; i < 256; ++i) prefill.fill(BlockId(i), 500 + static_cast<uint64_t>(i));
  std::mt19937_64 random(kFirstSeed);
  std::printf("seed %lu\n", static_cast<unsigned long>(kFirstSeed));
  struct Slot {
    std::optional<TransferId> receiving;
    std::optional<TransferId> sending;
    uint64_t seed = 1;
  };
  std::array<Slot, 8> slots;  // slot s owns blocks 25 s … on both sides
  for (size_t s = 0; s < slots.size(); ++s) {
    for (BlockId block : first_blocks(25, static_cast<int64_t>(25 * s))) decode.fill(block, slots[s].seed);
  }
  int64_t ok = 0;
  int64_t started = 0;
  uint64_t next_seed = 10'000;
  const auto handle_done = [&] {
    for (const Done& done : decode.take_done()) {
      for (size_t s = 0; s < slots.size(); ++s) {
        if (slots[s].receiving != done.id) continue;
        const std::vector<BlockId> blocks = first_blocks(25, static_cast<int64_t>(25 * s));
        for (BlockId block : blocks) {
          ASSERT_TRUE(!done.status.ok() || decode.holds(block, 500 + static_cast<uint64_t>(block.value)));
          decode.fill(block, next_seed);
        }
        slots[s].seed = next_seed++;
        slots[s].receiving.reset();
        ok += done.status.ok() ? 1 : 0;
      }
    }
    for (const Done& done : prefill.take_done()) {
      for (Slot& slot : slots) {
        if (slot.sending == done.id) slot.sending.reset();
      }
    }
  };
  for (int round = 0; round < kRounds; ++round) {
    const size_t s = random() % slots.size();
    Slot& slot = slots[s];
    while (slot.receiving.has_value() || slot.sending.has_value()) {
      if (slot.receiving.has_value() && random() % 4 == 0) decode.agent().abort(*slot.receiving);
      if (slot.sending.has_value() && random() % 4 == 0) prefill.agent().abort(*slot.sending);
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
      handle_done();
    }
    const std::vector<BlockId> blocks = first_blocks(25, static_cast<int64_t>(25 * s));
    for (BlockId block : blocks) ASSERT_TRUE(decode.holds(block, slot.seed)) << "round " << round;
    slot.receiving = decode.next_id();
    slot.sending = prefill.next_id();
    const std::string handle =
        decode.agent().expect(*slot.receiving, {0, blocks, kTokens}, clock.now_us() + 10'000'000);
    prefill.agent().begin_send(*slot.sending, decode.address(handle), {0, blocks, kTokens},
                               clock.now_us() + 10'000'000);
    ++started;
    const int64_t layers = random() % 3 == 0 ? static_cast<int64_t>(random() % 4) : 4;
    for (int64_t layer = 0; layer < layers; ++layer) prefill.agent().send_blocks(*slot.sending, layer, 0, 25);
    if (layers == 4) prefill.agent().commit_send(*slot.sending, FirstToken{});
    if (random() % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 1000));
    if (random() % 2 == 0) decode.agent().abort(*slot.receiving);
    if (layers < 4 && random() % 2 == 0) prefill.agent().abort(*slot.sending);
    handle_done();
  }
  for (Slot& slot : slots) {
    if (slot.receiving.has_value()) decode.agent().abort(*slot.receiving);
    if (slot.sending.has_value()) prefill.agent().abort(*slot.sending);
  }
  const int64_t end_us = clock.now_us() + 5'000'000;
  while (decode.agent().num_open() + prefill.agent().num_open() > 0 && clock.now_us() < end_us) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  handle_done();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));  // for anything late
  for (size_t s = 0; s < slots.size(); ++s) {
    EXPECT_FALSE(slots[s].receiving.has_value() || slots[s].sending.has_value());
    for (BlockId block : first_blocks(25, static_cast<int64_t>(25 * s)))
      ASSERT_TRUE(decode.holds(block, slots[s].seed));
  }
  EXPECT_EQ(decode.duplicate_dones + prefill.duplicate_dones, 0);
  EXPECT_EQ(decode.agent().num_open() + prefill.agent().num_open(), 0);
  std::printf("%ld of %ld transfers completed\n", static_cast<long>(ok), static_cast<long>(started));
  EXPECT_GT(ok, 10);
  EXPECT_LT(ok, started - 10);
}

int64_t cpu_time_us() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1'000'000 + usage.ru_utime.tv_usec + usage.ru_stime.tv_usec;
}

TEST_P(AgentTest, IdleAgentsSleep) {
  LocalPeer prefill(options("prefill"), peer_layout(), 64);
  LocalPeer decode(options("decode"), peer_layout(), 64);
  const TransferId pulling = decode.next_id();
  decode.agent().pull(pulling, prefill.address(prefill.agent().publish(prefill.next_id(), {0, first_blocks(10), 160})),
                      {0, first_blocks(10), 160}, 0);
  ASSERT_TRUE(decode.wait_done(pulling).has_value());
  prefill.agent().publish(prefill.next_id(), {0, first_blocks(10), 160});  // a lease is running
  // And a push whose prefill computes for long, kept by heartbeats.
  const TransferId receiving = decode.next_id();
  const std::string handle = decode.agent().expect(receiving, {0, first_blocks(10, 20), 160}, 0);
  prefill.agent().begin_send(prefill.next_id(), decode.address(handle), {0, first_blocks(10, 20), 160}, 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const int64_t before_us = cpu_time_us();
  std::this_thread::sleep_for(std::chrono::milliseconds(3000));
  const int64_t cpu_us = cpu_time_us() - before_us;
  std::printf("two idle agents: %ld us of CPU in 3 s\n", static_cast<long>(cpu_us));
  EXPECT_LT(cpu_us, 60'000);  // 1 % of 3 s, twice
  EXPECT_EQ(decode.agent().num_open(), 1);
}

TEST_P(AgentTest, StopsAtOnceWithOpenTransfers) {
  LocalPeer prefill(options("prefill"), peer_layout(), 64);
  LocalPeer decode(options("decode"), peer_layout(), 64);
  const TransferId receiving = decode.next_id();
  const TransferId sending = prefill.next_id();
  const std::string handle = decode.agent().expect(receiving, {0, first_blocks(10), 160}, 0);
  prefill.agent().begin_send(sending, decode.address(handle), {0, first_blocks(10), 160}, 0);
  EXPECT_FALSE(prefill.wait_done(sending, 50'000).has_value());
  const int64_t start_us = clock.now_us();
  prefill.stop();
  EXPECT_LT(clock.now_us() - start_us, 1'000'000);
  EXPECT_EQ(kind_of(decode.wait_done(receiving, 1'000'000)), ErrorKind::kUnavailable);  // told by the closing
}

TEST_P(AgentTest, BadAddressesAreErrors) {
  LocalPeer decode(options("decode"), peer_layout(), 64);
  KvTransferParams remote = decode.address("1-00112233445566778899aabbccddeeff");
  remote.remote_host = "no-such-host.invalid";
  TransferId id = decode.next_id();
  decode.agent().pull(id, remote, {0, first_blocks(1), 16}, 0);
  EXPECT_EQ(kind_of(decode.wait_done(id, 30'000'000)), ErrorKind::kUnavailable);
  remote.remote_host = "127.0.0.1";
  remote.remote_port = 0;
  id = decode.next_id();
  decode.agent().pull(id, remote, {0, first_blocks(1), 16}, 0);
  EXPECT_EQ(kind_of(decode.wait_done(id)), ErrorKind::kInvalidArgument);
  remote.remote_port = 1;  // nobody listens
  id = decode.next_id();
  decode.agent().pull(id, remote, {0, first_blocks(1), 16}, 0);
  const std::optional<Done> done = decode.wait_done(id);
  EXPECT_EQ(kind_of(done), ErrorKind::kUnavailable);
  EXPECT_THAT(done->status.error().message, HasSubstr("127.0.0.1:1"));
}

INSTANTIATE_TEST_SUITE_P(Transports, AgentTest,
                         testing::Values(comm::Transport::kSharedMemory, comm::Transport::kTcp, comm::Transport::kUcx,
                                         comm::Transport::kUcxTcp),
                         [](const testing::TestParamInfo<comm::Transport>& param) {
                           return comm::transport_option(param.param);
                         });

}  // namespace
}  // namespace tandem::transfer

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], tandem::transfer::kChildFlag) == 0)
    return tandem::transfer::run_child(argc, argv);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
