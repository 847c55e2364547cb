#include "src/kv/block_pool.h"

#include <algorithm>

#include "src/base/check.h"

namespace tandem::kv {

BlockPool::BlockPool(int64_t num_blocks) {
  CHECK_GT(num_blocks, 0);
  blocks_.resize(static_cast<size_t>(num_blocks));
  free_.reserve(static_cast<size_t>(num_blocks));
  for (int64_t i = num_blocks; i-- > 0;) free_.push_back(BlockId(static_cast<int32_t>(i)));
}

BlockPool::Block& BlockPool::at(BlockId block) {
  CHECK_GE(block.value, 0);
  CHECK_LT(block.value, num_blocks());
  return blocks_[static_cast<size_t>(block.value)];
}

const BlockPool::Block& BlockPool::at(BlockId block) const { return const_cast<BlockPool*>(this)->at(block); }

void BlockPool::forget_prefix(Block& block) {
  if (!block.prefix) return;
  by_prefix_.erase(*block.prefix);
  block.prefix.reset();
}

std::vector<BlockId> BlockPool::allocate(int64_t count) {
  CHECK_GE(count, 0);
  CHECK_LE(count, num_available());
  std::vector<BlockId> taken;
  taken.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    BlockId id;
    if (!free_.empty()) {
      id = free_.back();
      free_.pop_back();
    } else {
      id = lru_.front();
      lru_.pop_front();
      at(id).cached = false;
      forget_prefix(at(id));
    }
    CHECK_EQ(at(id).holders, 0);
    at(id).holders = 1;
    num_ever_used_ = std::max<int64_t>(num_ever_used_, id.value + 1);
    taken.push_back(id);
  }
  return taken;
}

void BlockPool::hold(BlockId id) {
  Block& block = at(id);
  if (block.cached) {
    lru_.erase(block.lru_place);
    block.cached = false;
  } else {
    CHECK_GT(block.holders, 0);
  }
  ++block.holders;
}

void BlockPool::release(BlockId id) {
  Block& block = at(id);
  CHECK_GT(block.holders, 0);
  if (--block.holders > 0) return;
  if (block.prefix) {
    block.lru_place = lru_.insert(lru_.end(), id);
    block.cached = true;
  } else {
    free_.push_back(id);
  }
}

void BlockPool::release_all(std::span<const BlockId> blocks) {
  for (size_t i = blocks.size(); i-- > 0;) release(blocks[i]);
}

void BlockPool::pin_all(std::span<const BlockId> blocks) {
  for (BlockId block : blocks) hold(block);
  num_pinned_ += static_cast<int64_t>(blocks.size());
}

void BlockPool::unpin_all(std::span<const BlockId> blocks) {
  release_all(blocks);
  num_pinned_ -= static_cast<int64_t>(blocks.size());
  CHECK_GE(num_pinned_, 0);
}

void BlockPool::register_prefix(BlockId id, const Hash256& prefix) {
  Block& block = at(id);
  CHECK_GT(block.holders, 0);
  if (block.prefix) {
    CHECK(*block.prefix == prefix);
    return;
  }
  if (by_prefix_.emplace(prefix, id).second) block.prefix = prefix;
}

std::optional<BlockId> BlockPool::find_prefix(const Hash256& prefix) const {
  const std::unordered_map<Hash256, BlockId>::const_iterator found = by_prefix_.find(prefix);
  if (found == by_prefix_.end()) return std::nullopt;
  return found->second;
}

int64_t BlockPool::drop_cached() {
  const int64_t dropped = num_cached();
  for (BlockId id : lru_) {
    at(id).cached = false;
    forget_prefix(at(id));
    free_.push_back(id);
  }
  lru_.clear();
  return dropped;
}

void BlockPool::forget_prefixes() {
  drop_cached();
  for (Block& block : blocks_) {
    if (block.prefix) forget_prefix(block);
  }
}

void BlockPool::check_integrity() const {
  int64_t held = 0;
  int64_t with_prefix = 0;
  for (const Block& block : blocks_) {
    CHECK_GE(block.holders, 0);
    if (block.holders > 0) {
      CHECK(!block.cached);
      ++held;
    }
    if (block.cached) CHECK(block.prefix.has_value());
    if (block.prefix) ++with_prefix;
  }
  CHECK_EQ(held + num_available(), num_blocks());
  CHECK_EQ(with_prefix, static_cast<int64_t>(by_prefix_.size()));
  for (BlockId id : free_) CHECK(at(id).holders == 0 && !at(id).prefix && !at(id).cached);
  for (BlockId id : lru_) CHECK(at(id).holders == 0 && at(id).cached);
}

}  // namespace tandem::kv
