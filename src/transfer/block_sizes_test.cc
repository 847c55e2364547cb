// KV between engines whose blocks differ in size: every token arrives, in its place, whatever the transport; and nothing
// else is written, above all not what the receiver had already.
#include <gtest/gtest.h>

#include <cstring>

#include "src/base/log.h"
#include "src/kernels/shapes.h"
#include "src/transfer/fake_network.h"
#include "src/transfer/test_peer.h"
#include "src/transfer/test_support.h"

namespace tandem::transfer {
namespace {

constexpr int64_t kMaxTokens = 200;
constexpr auto kNothing = std::byte{0xa5};  // memory that nobody has written

model::KvLayout make_layout(model::KvKind kind, int64_t block_size) {
  model::KvLayout layout;
  layout.kind = kind;
  layout.num_layers = 2;
  layout.block_size = block_size;
  if (kind == model::KvKind::kMla) {
    layout.latent_dim = 24;
    layout.rope_dim = 8;
    layout.bytes_per_token = 64;
  } else {  // a block of 64 tokens is larger than the payload of any transport but one
    layout.kv_heads = 2;
    layout.head_dim = 160;
    layout.bytes_per_token = 2 * 2 * 160 * 2;
  }
  return layout;
}

// Calls visit(offset in the block, number of the element) for each 16-bit element of one token.
template <typename F>
void for_each_element(const model::KvLayout& layout, int64_t slot, F visit) {
  const int64_t dim = layout.head_dim;
  int64_t number = 0;
  if (layout.kind == model::KvKind::kMla) {
    for (; number < layout.bytes_per_token / 2; ++number) visit(slot * layout.bytes_per_token + 2 * number, number);
    return;
  }
  for (int64_t head = 0; head < layout.kv_heads; ++head) {
    const int64_t k = head * 2 * layout.block_size * dim;
    const int64_t v = k + layout.block_size * dim;
    for (int64_t d = 0; d < dim; ++d) {
      visit(2 * (k + kernels::pair_index(d, dim, slot, layout.block_size)), number++);
      visit(2 * (v + kernels::pair_index(slot, layout.block_size, d, dim)), number++);
    }
  }
}

uint16_t value_of(uint64_t seed, int64_t layer, int64_t token, int64_t element) {
  uint64_t x = (seed * 1'000'003 + static_cast<uint64_t>((layer * 1000 + token) * 4096 + element)) * 0x9e3779b97f4a7c15;
  return static_cast<uint16_t>((x ^ (x >> 31)) >> 13);
}

// The prompt's tokens [first, end) as they lie in `blocks`; block i holds those from i * block_size on.
void write_tokens(const KvMemory& memory, const std::vector<BlockId>& blocks, uint64_t seed, int64_t first, int64_t end) {
  for (int64_t layer = 0; layer < memory.layout.num_layers; ++layer) {
    for (int64_t token = first; token < end; ++token) {
      const BlockId block = blocks[static_cast<size_t>(token / memory.layout.block_size)];
      std::byte* at = memory.base + layer * memory.layer_stride_bytes + block.value * memory.layout.block_bytes();
      for_each_element(memory.layout, token % memory.layout.block_size, [&](int64_t offset, int64_t number) {
        const uint16_t value = value_of(seed, layer, token, number);
        std::memcpy(at + offset, &value, sizeof value);
      });
    }
  }
}

std::vector<std::byte> copy_all(const KvMemory& memory) {
  return {memory.base, memory.base + memory.layout.num_layers * memory.layer_stride_bytes};
}

std::vector<BlockId> pick_blocks(const KvMemory& memory, int64_t tokens, std::mt19937_64& random) {
  std::vector<BlockId> all;
  for (int64_t i = 0; i < memory.num_blocks; ++i) all.emplace_back(static_cast<int32_t>(i));
  std::shuffle(all.begin(), all.end(), random);
  all.resize(static_cast<size_t>((tokens + memory.layout.block_size - 1) / memory.layout.block_size));
  return all;
}

int64_t blocks_of(int64_t tokens, int64_t block_size) { return (tokens + block_size - 1) / block_size; }

// A prompt, the blocks of both sides, and what decode's memory shall look like: what it has already in its first
// `cached` blocks, and elsewhere, stays; the slots behind the last token of a block that is sent may hold anything.
struct Prompt {
  Prompt(const KvMemory& from, const KvMemory& to, std::mt19937_64& random)
      : seed(random()), num_tokens(pick_length(from.layout.block_size, to.layout.block_size, random)) {
    source = pick_blocks(from, num_tokens, random);
    target = pick_blocks(to, num_tokens, random);
    if (random() % 3 != 0) cached = static_cast<int64_t>(random() % static_cast<uint64_t>(std::ssize(target) + 1));
    write_tokens(from, source, seed, 0, num_tokens);
    std::memset(to.base, static_cast<int>(kNothing), static_cast<size_t>(to.layout.num_layers * to.layer_stride_bytes));
    before = copy_all(to);
  }
  static int64_t pick_length(int64_t from, int64_t to, std::mt19937_64& random) {
    const int64_t around = (random() % 2 == 0 ? from : to) * static_cast<int64_t>(1 + random() % 4);
    return std::clamp<int64_t>(around - 1 + static_cast<int64_t>(random() % 3), 1, kMaxTokens);
  }
  BlockSpan source_span() const { return {0, source, num_tokens}; }
  BlockSpan target_span() const { return {cached, {target.begin() + cached, target.end()}, num_tokens}; }
  // Whether `to` holds every token that it lacked, and otherwise what it held before.
  void check(const KvMemory& to, bool arrived) const {
    std::vector<std::byte> expected = before;
    KvMemory wanted = to;
    wanted.base = expected.data();
    const int64_t first = cached * to.layout.block_size;
    std::vector<std::byte> seen = copy_all(to);
    KvMemory got = to;
    got.base = seen.data();
    // Not of interest: the slots of the target behind the last token; and if it failed, all of its slots.
    const int64_t end = std::ssize(target) * to.layout.block_size;
    const int64_t free_from = arrived ? std::max(first, num_tokens) : first;
    if (arrived) write_tokens(wanted, target, seed, first, num_tokens);
    write_tokens(wanted, target, 0, free_from, end);
    write_tokens(got, target, 0, free_from, end);
    ASSERT_EQ(seen, expected);
  }

  uint64_t seed;
  int64_t num_tokens;
  int64_t cached = 0;  // blocks of decode
  std::vector<BlockId> source, target;
  std::vector<std::byte> before;
};

struct Sizes {
  int64_t prefill = 0;
  int64_t decode = 0;
};
constexpr Sizes kSizes[] = {{64, 16}, {16, 64}, {16, 32}, {16, 16}, {6, 4}, {5, 4}, {4, 5}, {1, 16}, {16, 1}, {48, 64}};

// --- cores over a network in memory ---

class Core {
 public:
  Core(FakeNetwork& network, ManualClock& clock, int64_t port, const model::KvLayout& layout)
      : memory(layout, blocks_of(kMaxTokens, layout.block_size) + 3),
        core(memory.view(), options(), fmt::format("engine-{}:1", port), clock,
             [this](Done&& done) { ended.push_back(std::move(done)); }),
        messenger(network.add_node(port, core)) {
    core.set_messenger(messenger.get());
  }
  static AgentOptions options() {
    AgentOptions options;
    options.model_fingerprint = "model-a";
    options.idle_timeout_us = 1'000'000;
    options.connect_timeout_us = 500'000;
    options.lease_us = 2'000'000;
    return options;
  }

  TestMemory memory;
  std::vector<Done> ended;
  AgentCore core;
  std::unique_ptr<FakeNetwork::Node> messenger;
};

// One transfer over a new network. Returns whether it succeeded; checks the memory in any case.
bool transfer_once(model::KvKind kind, Sizes sizes, const NetworkFaults& faults, std::mt19937_64& random) {
  FakeNetwork network(random, faults);
  ManualClock clock;
  Core prefill(network, clock, 1, make_layout(kind, sizes.prefill));
  Core decode(network, clock, 2, make_layout(kind, sizes.decode));
  const Prompt prompt(prefill.memory.view(), decode.memory.view(), random);
  const Handle handle = make_handle(1);
  KvTransferParams remote;
  remote.remote_request_id = handle.to_string();
  remote.remote_host = "127.0.0.1";
  const TransferId id(1);
  const auto settle = [&] {
    do {
      while (prefill.core.pump() || decode.core.pump()) {
      }
    } while (network.step());
  };
  if (random() % 2 == 0) {
    remote.remote_port = 1;
    prefill.core.publish(id, handle, prompt.source_span());
    decode.core.pull(id, remote, prompt.target_span(), 0);
  } else {
    remote.remote_port = 2;
    decode.core.expect(id, handle, prompt.target_span(), 1'000'000);
    // What decode has already is not offered, where prefill's blocks allow that.
    BlockSpan span = prompt.source_span();
    span.first_block = std::min(prompt.cached * sizes.decode, prompt.num_tokens) / sizes.prefill;
    span.blocks.erase(span.blocks.begin(), span.blocks.begin() + span.first_block);
    prefill.core.begin_send(id, remote, span, 1'000'000);
    const int64_t count = std::ssize(prompt.source);
    for (int64_t done = 0; done < count;) {
      const int64_t chunk = 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(count - done));
      for (int64_t layer = 0; layer < 2; ++layer) prefill.core.send_blocks(id, layer, done, chunk);
      done += chunk;
      if (random() % 2 == 0) settle();
    }
    prefill.core.commit_send(id, FirstToken{7, 0, {}, 0});
  }
  for (int i = 0; i < 40; ++i) {
    settle();
    clock.advance_us(100'000);
    prefill.core.run_timers();
    decode.core.run_timers();
  }
  EXPECT_EQ(prefill.ended.size(), 1U);
  EXPECT_EQ(decode.ended.size(), 1U);
  const bool arrived = decode.ended.at(0).status.ok();
  prompt.check(decode.memory.view(), arrived);
  prefill.messenger.reset();
  decode.messenger.reset();
  return arrived;
}

void transfer_many(const NetworkFaults& faults, int64_t count, int64_t least_ok) {
  init_log(LogLevel::kError, "");
  std::printf("seed %lu\n", static_cast<unsigned long>(kFirstSeed));
  for (const model::KvKind kind : {model::KvKind::kMla, model::KvKind::kGqa}) {
    for (const Sizes sizes : kSizes) {
      std::mt19937_64 random(kFirstSeed);
      int64_t ok = 0;
      for (int64_t i = 0; i < count; ++i) {
        ok += transfer_once(kind, sizes, faults, random) ? 1 : 0;
        ASSERT_FALSE(testing::Test::HasFailure()) << sizes.prefill << " to " << sizes.decode << ", number " << i;
      }
      EXPECT_GE(ok, least_ok) << sizes.prefill << " to " << sizes.decode;
    }
  }
  init_log(LogLevel::kInfo, "");
}

TEST(BlockSizes, EveryTokenArrives) { transfer_many({}, 40, 40); }
TEST(BlockSizes, ReorderedRepeatedDroppedAndDamaged) { transfer_many({0.2, 0.05, 0.02, 0.02}, 40, 5); }

// --- real agents ---

class Peer {
 public:
  Peer(const AgentOptions& options, const model::KvLayout& layout)
      : ops_(kernels::make_ops("ref", 1).value()),
        cache_(*ops_, layout, blocks_of(kMaxTokens, layout.block_size) + 3, /*shareable=*/true),
        agent(make_agent(cache_, options, [this] {
                const std::lock_guard<std::mutex> lock(mutex_);
                has_news_ = true;
                woken_.notify_one();
              }).value()) {}

  KvMemory memory() const { return {cache_.base(), cache_.layer_stride_bytes(), cache_.num_blocks(), cache_.layout()}; }
  Status wait_done() {
    while (true) {
      const std::vector<Done> done = agent->take_done();
      if (!done.empty()) return done[0].status;
      std::unique_lock<std::mutex> lock(mutex_);
      if (!woken_.wait_for(lock, std::chrono::seconds(10), [this] { return std::exchange(has_news_, false); })) {
        return make_error(ErrorKind::kDeadlineExceeded, "no Done");
      }
    }
  }
  KvTransferParams address(const std::string& handle) const {
    KvTransferParams params;
    params.remote_engine_id = agent->engine_id();
    params.remote_request_id = handle;
    params.remote_host = "127.0.0.1";
    params.remote_port = agent->port();
    return params;
  }

 private:
  std::mutex mutex_;
  std::condition_variable woken_;
  bool has_news_ = false;
  std::unique_ptr<kernels::Ops> ops_;
  model::KvCache cache_;

 public:
  std::unique_ptr<Agent> agent;  // goes first: it uses the cache
};

class BlockSizesAgentTest : public testing::TestWithParam<comm::Transport> {};

TEST_P(BlockSizesAgentTest, EveryTokenArrivesWithAndWithoutChecksum) {
  std::mt19937_64 random(kFirstSeed);
  std::printf("seed %lu\n", static_cast<unsigned long>(kFirstSeed));
  for (const model::KvKind kind : {model::KvKind::kMla, model::KvKind::kGqa}) {
    for (const Sizes sizes : {Sizes{64, 16}, Sizes{16, 64}, Sizes{5, 4}}) {
      AgentOptions options = make_options("prefill", GetParam());
      options.checksum = random() % 2 == 0 ? KvChecksum::kOn : KvChecksum::kOff;
      Peer prefill(options, make_layout(kind, sizes.prefill));
      Peer decode(make_options("decode", GetParam()), make_layout(kind, sizes.decode));
      for (uint64_t number = 1; number <= 24; ++number) {
        const Prompt prompt(prefill.memory(), decode.memory(), random);
        const TransferId id(number);
        if (number % 2 == 0) {
          const std::string handle = prefill.agent->publish(id, prompt.source_span());
          decode.agent->pull(id, prefill.address(handle), prompt.target_span(), 0);
        } else {
          const std::string handle = decode.agent->expect(id, prompt.target_span(), 0);
          prefill.agent->begin_send(id, decode.address(handle), prompt.source_span(), 0);
          for (int64_t layer = 0; layer < 2; ++layer) {
            prefill.agent->send_blocks(id, layer, 0, std::ssize(prompt.source));
          }
          prefill.agent->commit_send(id, FirstToken{7, 0, {}, 0});
        }
        const Status received = decode.wait_done();
        ASSERT_TRUE(received.ok()) << received.error().message;
        ASSERT_TRUE(prefill.wait_done().ok());
        prompt.check(decode.memory(), true);
        ASSERT_FALSE(HasFailure()) << sizes.prefill << " to " << sizes.decode << ", " << prompt.num_tokens << " tokens, "
                                   << prompt.cached << " blocks cached";
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Transports, BlockSizesAgentTest,
                         testing::Values(comm::Transport::kSharedMemory, comm::Transport::kTcp, comm::Transport::kUcx,
                                         comm::Transport::kUcxTcp),
                         [](const auto& suite) { return comm::transport_option(suite.param); });

}  // namespace
}  // namespace tandem::transfer
