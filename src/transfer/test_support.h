// Shared by the tests of this folder: a small KV memory whose bytes can be recognised, and seeds that are printed.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "src/base/clock.h"
#include "src/transfer/agent_core.h"

namespace tandem::transfer {

inline model::KvLayout make_layout(int64_t num_layers = 3, int64_t block_size = 4, int64_t bytes_per_token = 24) {
  model::KvLayout layout;
  layout.kind = model::KvKind::kMla;
  layout.num_layers = num_layers;
  layout.block_size = block_size;
  layout.bytes_per_token = bytes_per_token;
  layout.latent_dim = 8;
  layout.rope_dim = bytes_per_token / 2 - 8;
  return layout;
}

// KV memory in plain bytes.
class TestMemory {
 public:
  TestMemory(const model::KvLayout& layout, int64_t num_blocks, uint8_t fill = 0)
      : layout_(layout),
        num_blocks_(num_blocks),
        bytes_(static_cast<size_t>(layout.num_layers * num_blocks * layout.block_bytes()), fill) {}

  KvMemory view() {
    return {reinterpret_cast<std::byte*>(bytes_.data()), num_blocks_ * layout_.block_bytes(), num_blocks_, layout_};
  }
  uint8_t* block(int64_t layer, BlockId id) {
    return bytes_.data() + (layer * num_blocks_ + id.value) * layout_.block_bytes();
  }
  std::vector<uint8_t> read(int64_t layer, BlockId id) {
    return {block(layer, id), block(layer, id) + layout_.block_bytes()};
  }
  // All layers of one block get bytes that depend on `seed`, layer and offset.
  void fill(BlockId id, uint64_t seed) {
    for (int64_t layer = 0; layer < layout_.num_layers; ++layer) {
      for (int64_t i = 0; i < layout_.block_bytes(); ++i) block(layer, id)[i] = pattern(seed, layer, i);
    }
  }
  bool holds(BlockId id, uint64_t seed) {
    for (int64_t layer = 0; layer < layout_.num_layers; ++layer) {
      for (int64_t i = 0; i < layout_.block_bytes(); ++i) {
        if (block(layer, id)[i] != pattern(seed, layer, i)) return false;
      }
    }
    return true;
  }

 private:
  static uint8_t pattern(uint64_t seed, int64_t layer, int64_t i) {
    uint64_t x = (seed + 1) * 0x9e3779b97f4a7c15ULL + static_cast<uint64_t>(layer * 1'000'003 + i);
    x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9ULL;
    return static_cast<uint8_t>(x >> 56);
  }

  model::KvLayout layout_;
  int64_t num_blocks_;
  std::vector<uint8_t> bytes_;
};

inline std::vector<BlockId> make_blocks(std::initializer_list<int32_t> ids) {
  std::vector<BlockId> blocks;
  for (int32_t id : ids) blocks.emplace_back(id);
  return blocks;
}

// The first seed of a random test: fixed, so that a failure in CI can be repeated.
inline constexpr uint64_t kFirstSeed = 20240;

}  // namespace tandem::transfer
