// For tests of whole agents over a network in memory: what stands in for the engine.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "src/transfer/fake_network.h"
#include "src/transfer/test_support.h"

namespace tandem::transfer {

inline constexpr int32_t kNumBlocks = 24;
inline constexpr int64_t kBlockSize = 4;

// An engine as far as transfers care: blocks with known contents, pins, and Done events.
class TestEngine {
 public:
  struct Open {
    bool receiving = false;
    std::vector<BlockId> blocks;
    std::vector<uint64_t> expected;  // receiving: seeds of the blocks that should arrive
    Handle handle;
  };

  TestEngine(FakeNetwork& network, ManualClock& clock, int64_t port, const std::string& name, uint64_t incarnation,
             const AgentOptions& options = default_options(), const model::KvLayout& layout = make_layout())
      : memory(layout, kNumBlocks),
        engine_id(fmt::format("{}:{}", name, incarnation)),
        port_(port),
        core(memory.view(), options, engine_id, clock, [this](Done&& done) { finish(std::move(done)); }),
        messenger(network.add_node(port, core)) {
    core.set_messenger(messenger.get());
    for (int32_t i = 0; i < kNumBlocks; ++i) {
      free.emplace_back(i);
      seeds[i] = 1'000'000 * incarnation + static_cast<uint64_t>(i);
      memory.fill(BlockId(i), seeds[i]);
    }
  }
  static AgentOptions default_options() {
    AgentOptions options;
    options.model_fingerprint = "model-a";
    options.idle_timeout_us = 1'000'000;
    options.connect_timeout_us = 500'000;
    options.lease_us = 3'000'000;
    return options;
  }

  std::vector<BlockId> take(int64_t count) {
    if (std::ssize(free) < count) return {};
    std::vector<BlockId> blocks(free.end() - count, free.end());
    free.erase(free.end() - count, free.end());
    return blocks;
  }
  // What the peer needs to know to reach a handle of this engine.
  KvTransferParams address(const std::string& handle) const {
    KvTransferParams params;
    params.remote_engine_id = engine_id;
    params.remote_request_id = handle;
    params.remote_host = "127.0.0.1";
    params.remote_port = port_;
    return params;
  }
  TransferId open(bool receiving, const std::vector<BlockId>& blocks, std::vector<uint64_t> expected = {}) {
    const TransferId id(next_id++);
    opened[id] = Open{receiving, blocks, std::move(expected), {}};
    ++num_opened;
    return id;
  }
  std::vector<uint64_t> seeds_of(const std::vector<BlockId>& blocks) {
    std::vector<uint64_t> list;
    for (BlockId block : blocks) list.push_back(seeds[block.value]);
    return list;
  }

  void finish(Done&& done) {
    const auto found = opened.find(done.id);
    ASSERT_NE(found, opened.end()) << "a second Done, or one of an unknown transfer";
    if (found->second.receiving && done.status.ok()) {
      for (size_t i = 0; i < found->second.blocks.size(); ++i) {
        ASSERT_TRUE(memory.holds(found->second.blocks[i], found->second.expected[i])) << "wrong bytes arrived";
      }
    }
    for (BlockId block : found->second.blocks) {
      free.push_back(block);
      if (!found->second.receiving) continue;
      seeds[block.value] = next_seed++;  // the next owner writes at once
      memory.fill(block, seeds[block.value]);
    }
    opened.erase(found);
    ended.emplace(done.id, std::move(done));
  }
  // No block has bytes that its owner did not write, those being received apart.
  void check_blocks() {
    std::vector<bool> receiving(kNumBlocks, false);
    for (const auto& [id, open] : opened) {
      for (BlockId block : open.blocks) receiving[static_cast<size_t>(block.value)] = open.receiving;
    }
    for (int32_t i = 0; i < kNumBlocks; ++i) {
      if (receiving[static_cast<size_t>(i)]) continue;
      ASSERT_TRUE(memory.holds(BlockId(i), seeds[i])) << engine_id << " block " << i << " has foreign bytes";
    }
  }

  TestMemory memory;
  std::string engine_id;
  int64_t port_;
  AgentCore core;
  std::unique_ptr<FakeNetwork::Node> messenger;
  std::vector<BlockId> free;
  std::map<int32_t, uint64_t> seeds;
  uint64_t next_seed = 5'000'000;
  uint64_t next_id = 1;
  int64_t num_opened = 0;
  std::map<TransferId, Open> opened;
  std::map<TransferId, Done> ended;
};

}  // namespace tandem::transfer
