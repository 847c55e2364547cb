// The canary over the real agent: two of them, with their threads, on the real transport. Block pools are so small that
// a block which is given back is soon somebody else's; transfers are aborted at random moments by either side; the
// agents' threads often come late, so that what was sent before an abort is written, or would be, long after it. A
// block that is given back is filled with a pattern at once, and every free block is looked at after every end.
//
// That the test can find something is shown by engines that give blocks back before Done.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "src/base/clock.h"
#include "src/kernels/ops.h"
#include "src/sim/checker.h"
#include "src/sim/random.h"
#include "src/sim/violation.h"
#include "src/sim/wrappers.h"

namespace tandem::sim {
namespace {

using transfer::Agent;
using transfer::BlockSpan;
using transfer::Done;
using transfer::TransferId;

constexpr int64_t kBlocks = 96;           // of each side
constexpr size_t kMaxOpen = 16;           // transfers at a time
constexpr int64_t kMaxSize = 10;          // blocks of one transfer
constexpr int64_t kChunk = 4;             // blocks handed over at a time
constexpr int64_t kLateUs = 2'000;        // an agent's thread comes so late at most
constexpr int64_t kPullLifeUs = 4'000;    // aborts of a pull come within this time after its start
constexpr int64_t kPushLifeUs = 2'500;    // … of a push after one of its later pieces was handed over
constexpr int64_t kGapUs = 600;           // between two pieces of a push at most
constexpr int64_t kStallUs = 500;         // a command waits so long at most before the agent sees it
constexpr int64_t kLimitUs = 20'000'000;  // of a transfer; reached only if an end is lost

model::KvLayout small_layout() {
  model::KvLayout layout;
  layout.kind = model::KvKind::kMla;
  layout.num_layers = 3;
  layout.block_size = 16;
  layout.bytes_per_token = 256;
  layout.latent_dim = 96;
  layout.rope_dim = 32;
  return layout;
}

// What a messenger and its handler share; of the agent's thread, but for the counts.
struct Lateness {
  explicit Lateness(uint64_t seed) : random(seed) {}
  void sleep(double probability) {
    if (random.chance(probability)) std::this_thread::sleep_for(std::chrono::microseconds(random.range(1, kLateUs)));
  }

  Random random;
  bool keeps_lent = false;           // a bug: what an agent takes back stays lent
  std::set<uint64_t> kept;           // tokens of such payloads
  std::atomic<int64_t> revoked = 0;  // payloads taken back while the transport or the peer could read them
  std::atomic<int64_t> stale = 0;    // borrowed payloads that had been taken back when they were about to be copied
};

// Between the moment when the transport has a payload for the agent and that when it is copied, time passes.
class LateHandler final : public HandlerWrapper {
 public:
  LateHandler(comm::MessageHandler& inner, std::shared_ptr<Lateness> lateness)
      : HandlerWrapper(inner), lateness_(std::move(lateness)) {}

  void on_borrowed_message(comm::ConnectionId connection, std::span<const std::byte> message,
                           const comm::BorrowedPayload& payload) override {
    lateness_->sleep(0.05);
    if (!payload.is_valid()) ++lateness_->stale;
    inner_.on_borrowed_message(connection, message, payload);
  }
  void on_sent(comm::ConnectionId connection, uint64_t token) override {
    if (lateness_->kept.erase(token) == 0) inner_.on_sent(connection, token);
  }

 private:
  std::shared_ptr<Lateness> lateness_;
};

// A messenger whose thread is often late: whatever it would read or write then, it does long after it was asked to.
class LateMessenger final : public MessengerWrapper {
 public:
  LateMessenger(std::unique_ptr<comm::Messenger> inner, std::unique_ptr<LateHandler> handler,
                std::shared_ptr<Lateness> lateness)
      : MessengerWrapper(std::move(inner)), handler_(std::move(handler)), lateness_(std::move(lateness)) {}
  ~LateMessenger() override { inner_.reset(); }  // it calls the handler

  void poll(int64_t timeout_us) override {
    lateness_->sleep(0.15);
    inner_->poll(timeout_us);
  }
  void revoke(comm::ConnectionId connection, uint64_t token) override {
    ++lateness_->revoked;
    if (!lateness_->keeps_lent) return inner_->revoke(connection, token);
    lateness_->kept.insert(token);
  }

 private:
  std::unique_ptr<LateHandler> handler_;
  std::shared_ptr<Lateness> lateness_;
};

// When an engine gives blocks back; only the first is right. The last gives them back at Done, too, but its messenger
// does not take back what it has lent.
enum class Release { kAtDone, kAtAbort, kAtCommit, kWhileLent };

// One engine's side: memory, pool and agent. Everything but the agent's own thread is the test's thread.
class Side {
 public:
  Side(const std::string& name, KvRole role, comm::Transport transport, Release release, uint64_t seed)
      : lateness_(std::make_shared<Lateness>(seed)),
        ops_(kernels::make_ops("ref", 1).value()), 
        cache_(*ops_, small_layout(), kBlocks, /*shareable=*/true),
        pool_(kBlocks) {
    lateness_->keeps_lent = release == Release::kWhileLent;
    transfer::AgentOptions options;
    options.engine_id = name;
    options.model_fingerprint = "m";
    options.role = role;
    options.transport = transport;
    canary_ = std::make_unique<Canary>(cache_, pool_);
    agent_ = transfer::make_agent(
                 cache_, options, [] {},
                 [late = lateness_](const comm::MessengerOptions& to,
                                    comm::MessageHandler& handler) -> Result<std::unique_ptr<comm::Messenger>> {
                   std::unique_ptr<LateHandler> late_handler = std::make_unique<LateHandler>(handler, late);
                   TANDEM_ASSIGN(std::unique_ptr<comm::Messenger> real, comm::make_messenger(to, *late_handler));
                   return std::unique_ptr<comm::Messenger>(
                       std::make_unique<LateMessenger>(std::move(real), std::move(late_handler), late));
                 })
                 .value();
  }

  Agent& agent() { return *agent_; }
  const Lateness& lateness() const { return *lateness_; }
  bool has_room(int64_t count) const { return pool_.num_available() >= count; }
  std::vector<BlockId> take(int64_t count) {
    std::vector<BlockId> blocks = pool_.allocate(count);
    canary_->look(false);  // they are not free from now on
    return blocks;
  }
  // They are somebody else's from now on.
  void give_back(const std::vector<BlockId>& blocks) {
    pool_.release_all(blocks);
    canary_->look(false);
  }
  void look() { canary_->look(false); }
  bool is_idle() const { return pool_.num_available() == kBlocks && agent_->num_open() == 0; }

  // All layers of one block get words that tell transfer, place in the prompt and layer.
  void write(BlockId block, uint64_t transfer, int64_t index) {
    for_each_word(block, transfer, index, [](std::byte* at, uint64_t word) {
      std::memcpy(at, &word, sizeof word);
      return true;
    });
  }
  bool holds(BlockId block, uint64_t transfer, int64_t index) {
    return for_each_word(block, transfer, index,
                         [](std::byte* at, uint64_t word) { return std::memcmp(at, &word, sizeof word) == 0; });
  }

 private:
  template <typename F>
  bool for_each_word(BlockId block, uint64_t transfer, int64_t index, F visit) {
    for (int64_t layer = 0; layer < cache_.layout().num_layers; ++layer) {
      uint64_t word = ((transfer << 16) + (static_cast<uint64_t>(index) << 8) + static_cast<uint64_t>(layer) + 1) *
                      0x9e3779b97f4a7c15;
      std::byte* at = cache_.block_address(layer, block);
      for (int64_t i = 0; i < cache_.layout().block_bytes(); i += 8, ++word) {
        if (!visit(at + i, word)) return false;
      }
    }
    return true;
  }

  std::shared_ptr<Lateness> lateness_;
  std::unique_ptr<kernels::Ops> ops_;
  model::KvCache cache_;
  kv::BlockPool pool_;
  std::unique_ptr<Canary> canary_;
  std::unique_ptr<Agent> agent_;  // goes first: it uses the cache
};

struct Transfer {
  uint64_t number = 0;
  bool pulls = false;
  std::vector<BlockId> source, target;  // blocks; empty once given back
  int64_t size = 0;
  int64_t next_piece = 0;  // of push: layer by layer, chunk by chunk
  int64_t next_us = 0;     // when it goes
  int64_t abort_us = 0;    // 0: never, or not known yet
  int64_t abort_piece = -1;  // of push: the abort comes after it was handed over; -1: never
  bool sender_aborts = false;
  bool receiver_aborts = false;
  int64_t stalled_abort_us = 0;  // the decision is made, the agent hears of it then
  std::optional<Done> sent, received;

  TransferId id() const { return TransferId(number); }
  bool was_aborted() const { return is_aborted(sent) || is_aborted(received); }
  static bool is_aborted(const std::optional<Done>& done) {
    return done && !done->status.ok() && done->status.error().kind == ErrorKind::kAborted;
  }
};

struct Counts {
  int64_t aborted = 0;
  int64_t aborted_midway = 0;  // some of its bytes had arrived
  int64_t completed = 0;
  int64_t failed = 0;  // otherwise
  int64_t revoked = 0;  // Lateness
  int64_t stale = 0;
};

class CanaryRun {
 public:
  CanaryRun(Release release, comm::Transport transport, uint64_t seed)
      : release_(release),
        random_(seed),
        prefill_("prefill", KvRole::kProducer, transport, release, seed + 1),
        decode_("decode", KvRole::kConsumer, transport, release, seed + 2) {}

  // Until so many transfers were aborted. Throws a Violation.
  Counts run(int64_t aborted) {
    while (counts_.aborted < aborted || !open_.empty()) {
      if (counts_.aborted < aborted) start_some();
      for (auto& [number, transfer] : open_) advance(transfer);
      collect(prefill_, &Transfer::sent);
      collect(decode_, &Transfer::received);
      retire_ended();
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    if (!prefill_.is_idle() || !decode_.is_idle()) throw Violation("at-rest", "blocks or transfers are left");
    counts_.revoked = prefill_.lateness().revoked;
    counts_.stale = decode_.lateness().stale;
    return counts_;
  }

 private:
  void start_some() {
    while (open_.size() < kMaxOpen) {
      const int64_t size = random_.range(1, kMaxSize);
      if (!prefill_.has_room(size) || !decode_.has_room(size)) return;
      Transfer& transfer = open_[++last_number_];
      transfer.number = last_number_;
      transfer.size = size;
      transfer.pulls = random_.chance(0.4);
      transfer.source = prefill_.take(size);
      transfer.target = decode_.take(size);
      for (int64_t i = 0; i < size; ++i) prefill_.write(transfer.source[static_cast<size_t>(i)], transfer.number, i);
      if (random_.chance(0.85)) {
        if (transfer.pulls) {
          transfer.abort_us = clock_.now_us() + random_.range(0, kPullLifeUs);
        } else {
          transfer.abort_piece = random_.range(num_pieces(transfer) / 3, num_pieces(transfer));
        }
        const int64_t who = random_.range(0, 4);
        transfer.sender_aborts = who == 0 || who > 2;
        transfer.receiver_aborts = who != 0 && who != 3;
      }
      begin(transfer);
    }
  }

  void begin(Transfer& transfer) {
    const int64_t tokens = transfer.size * small_layout().block_size;
    const int64_t deadline_us = clock_.now_us() + kLimitUs;
    transfer::KvTransferParams remote;
    remote.remote_host = "127.0.0.1";
    if (transfer.pulls) {
      remote.remote_request_id = prefill_.agent().publish(transfer.id(), {0, transfer.source, tokens});
      remote.remote_engine_id = prefill_.agent().engine_id();
      remote.remote_port = prefill_.agent().port();
      decode_.agent().pull(transfer.id(), remote, {0, transfer.target, tokens}, deadline_us);
      return;
    }
    remote.remote_request_id = decode_.agent().expect(transfer.id(), {0, transfer.target, tokens}, deadline_us);
    remote.remote_engine_id = decode_.agent().engine_id();
    remote.remote_port = decode_.agent().port();
    prefill_.agent().begin_send(transfer.id(), remote, {0, transfer.source, tokens}, deadline_us);
  }

  void advance(Transfer& transfer) {
    const int64_t now_us = clock_.now_us();
    if (transfer.abort_us != 0 && now_us >= transfer.abort_us) decide_abort(transfer, now_us);
    if (transfer.stalled_abort_us != 0 && now_us >= transfer.stalled_abort_us) abort(transfer);
    if (!transfer.pulls && !transfer.sent && now_us >= transfer.next_us) hand_over(transfer, now_us);
  }

  // Before the commit.
  static int64_t num_pieces(const Transfer& transfer) {
    return small_layout().num_layers * ((transfer.size + kChunk - 1) / kChunk);
  }

  // What is computed next goes to the agent: one chunk of one layer.
  void hand_over(Transfer& transfer, int64_t now_us) {
    const int64_t layers = small_layout().num_layers;
    if (transfer.next_piece > num_pieces(transfer)) return;
    if (transfer.next_piece == transfer.abort_piece) transfer.abort_us = now_us + random_.range(1, kPushLifeUs);
    transfer.next_us = now_us + random_.range(0, kGapUs);
    const int64_t piece = transfer.next_piece++;
    if (piece < num_pieces(transfer)) {
      const int64_t first = piece / layers * kChunk;
      return prefill_.agent().send_blocks(transfer.id(), piece % layers, first,
                                          std::min(kChunk, transfer.size - first));
    }
    prefill_.agent().commit_send(transfer.id(), {7, -0.5F, {}, 0});
    if (release_ == Release::kAtCommit) prefill_.give_back(std::exchange(transfer.source, {}));
  }

  // The engine drops the request; its agent hears of it a moment later.
  void decide_abort(Transfer& transfer, int64_t now_us) {
    transfer.abort_us = 0;
    transfer.stalled_abort_us = now_us + random_.range(0, kStallUs);
    if (release_ != Release::kAtAbort) return;
    if (transfer.sender_aborts) prefill_.give_back(std::exchange(transfer.source, {}));
    if (transfer.receiver_aborts) decode_.give_back(std::exchange(transfer.target, {}));
  }

  void abort(Transfer& transfer) {
    transfer.stalled_abort_us = 0;
    if (transfer.sender_aborts) prefill_.agent().abort(transfer.id());
    if (transfer.receiver_aborts) decode_.agent().abort(transfer.id());
  }

  void collect(Side& side, std::optional<Done> Transfer::*place) {
    for (Done& done : side.agent().take_done()) {
      const auto found = open_.find(done.id.value);
      if (found == open_.end() || (found->second.*place).has_value()) throw Violation("one-done", "a second Done");
      Transfer& transfer = found->second;
      transfer.*place = std::move(done);
      const bool is_receiver = &side == &decode_;
      if (is_receiver && transfer.received->status.ok()) check_received(transfer);
      side.give_back(std::exchange(is_receiver ? transfer.target : transfer.source, {}));
    }
  }

  void check_received(const Transfer& transfer) {
    for (size_t i = 0; i < transfer.target.size(); ++i) {
      if (decode_.holds(transfer.target[i], transfer.number, static_cast<int64_t>(i))) continue;
      throw Violation("own-bytes", fmt::format("block {} of transfer {} holds other bytes", i, transfer.number));
    }
  }

  void retire_ended() {
    std::erase_if(open_, [this](const auto& entry) {
      const Transfer& transfer = entry.second;
      if (!transfer.sent || !transfer.received) return false;
      const bool is_complete = transfer.received->status.ok();
      if (is_complete) {
        ++counts_.completed;
      } else if (transfer.was_aborted()) {
        ++counts_.aborted;
        if (transfer.received->bytes > 0) ++counts_.aborted_midway;
      } else {
        ++counts_.failed;
      }
      prefill_.look();
      decode_.look();
      return true;
    });
  }

  const Release release_;
  const SteadyClock clock_;
  Random random_;
  Side prefill_;
  Side decode_;
  std::map<uint64_t, Transfer> open_;
  uint64_t last_number_ = 0;
  Counts counts_;
};

class CanaryTest : public testing::TestWithParam<comm::Transport> {
 protected:
  CanaryTest() { std::printf("seed %lu\n", static_cast<unsigned long>(seed)); }
  const uint64_t seed = std::random_device{}();
};

TEST_P(CanaryTest, TenThousandAbortedTransfersLeaveNoForeignByte) {
  CanaryRun run(Release::kAtDone, GetParam(), seed);
  const Counts counts = run.run(10'000);
  std::printf("%ld aborted, %ld of them with some of their bytes there; %ld completed; %ld payloads taken back, %ld of "
              "them under the reader's eyes\n",
              static_cast<long>(counts.aborted), static_cast<long>(counts.aborted_midway),
              static_cast<long>(counts.completed), static_cast<long>(counts.revoked), static_cast<long>(counts.stale));
  EXPECT_EQ(counts.failed, 0);
  EXPECT_GT(counts.aborted_midway, counts.aborted / 20);
  if (GetParam() == comm::Transport::kSharedMemory) {  // over the others the transport has its own copy at once
    EXPECT_GT(counts.revoked, counts.aborted / 2);
    EXPECT_GT(counts.stale, 20);
  }
  EXPECT_GT(counts.completed, counts.aborted / 20);
}

void expect_found(Release release, comm::Transport transport, uint64_t seed, const std::set<std::string>& invariants) {
  CanaryRun run(release, transport, seed);
  try {
    run.run(10'000);
    ADD_FAILURE() << "not found";
  } catch (const Violation& violation) {
    std::printf("found: %s\n", violation.what());
    EXPECT_TRUE(invariants.contains(violation.invariant()));
  }
}

// Written by a receiver that has not heard of it yet, or, if the sender gave them back, read for a transfer that still
// completes.
TEST_P(CanaryTest, FindsBlocksThatAreFreedAtTheAbort) {
  expect_found(Release::kAtAbort, GetParam(), seed, {"free-blocks-untouched", "own-bytes"});
}
TEST_P(CanaryTest, FindsBlocksThatAreFreedAtTheCommit) {
  expect_found(Release::kAtCommit, GetParam(), seed, {"own-bytes"});
}

// Decode reads what is somebody else's by then, and the commit that was sent before the abort makes it count.
TEST_P(CanaryTest, FindsBlocksThatAreFreedWhileTheyAreLent) {
  if (GetParam() != comm::Transport::kSharedMemory) GTEST_SKIP() << "nothing is lent for long";
  expect_found(Release::kWhileLent, GetParam(), seed, {"own-bytes"});
}

INSTANTIATE_TEST_SUITE_P(Transports, CanaryTest,
                         testing::Values(comm::Transport::kSharedMemory, comm::Transport::kTcp, comm::Transport::kUcx,
                                         comm::Transport::kUcxTcp),
                         [](const auto& suite) { return comm::transport_option(suite.param); });

}  // namespace
}  // namespace tandem::sim
