// Who may use which block of the KV cache. Purely logical: no memory is touched here.
//
// A block is in exactly one state:
//   free    no holder, content worthless
//   cached  no holder, content is the KV of a known prefix and may be found again, evicted least recently used first
//   held    one or more holders: sequences, and transfers that read or write it (a transfer's hold is called a pin)
// A block leaves `held` only when its last holder has let go, so it cannot be reused while anybody still reads or
// writes.
#pragma once

#include <cstdint>
#include <list>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "src/base/hash.h"
#include "src/base/ids.h"

namespace tandem::kv {

class BlockPool {
 public:
  explicit BlockPool(int64_t num_blocks);

  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }
  // Blocks that allocate() could hand out now: free and cached.
  int64_t num_available() const { return static_cast<int64_t>(free_.size() + lru_.size()); }
  int64_t num_cached() const { return static_cast<int64_t>(lru_.size()); }
  int64_t num_pinned() const { return num_pinned_; }
  // Blocks from 0 on that have been handed out before; the others have never been used.
  int64_t num_ever_used() const { return num_ever_used_; }
  int64_t holders(BlockId block) const { return at(block).holders; }
  // Neither held nor cached: its content is worthless.
  bool is_free(BlockId block) const { return at(block).holders == 0 && !at(block).cached; }

  // `count` blocks with one holder each, free ones first, then the least recently used cached ones (which lose their
  // prefix). The caller has checked num_available().
  std::vector<BlockId> allocate(int64_t count);
  // One more holder for a cached or held block.
  void hold(BlockId block);
  // One holder less; the last one makes it cached if its content is a registered prefix, else free.
  void release(BlockId block);
  // Releases in reverse order, so that the deepest blocks of a prefix are evicted first.
  void release_all(std::span<const BlockId> blocks);

  // The same as hold and release, counted apart: the holder is a transfer.
  void pin_all(std::span<const BlockId> blocks);
  void unpin_all(std::span<const BlockId> blocks);

  // Says that a held block contains the KV of the prefix with this hash. If another block has it already nothing
  // changes: both stay valid, only the first can be found.
  void register_prefix(BlockId block, const Hash256& prefix);
  // The block with this prefix, held or cached.
  std::optional<BlockId> find_prefix(const Hash256& prefix) const;
  // Forgets every prefix that nobody holds; returns how many.
  int64_t drop_cached();
  // Forgets all, also those of held blocks: no content is known any more.
  void forget_prefixes();

  // CHECKs that lists, states and counts agree; O(num_blocks). For tests and idle moments.
  void check_integrity() const;

 private:
  struct Block {
    int32_t holders = 0;
    std::optional<Hash256> prefix;
    std::list<BlockId>::iterator lru_place;  // valid while cached
    bool cached = false;
  };
  Block& at(BlockId block);
  const Block& at(BlockId block) const;
  void forget_prefix(Block& block);

  std::vector<Block> blocks_;
  std::vector<BlockId> free_;  // used as a stack
  std::list<BlockId> lru_;     // least recently used first
  std::unordered_map<Hash256, BlockId> by_prefix_;
  int64_t num_pinned_ = 0;
  int64_t num_ever_used_ = 0;
};

}  // namespace tandem::kv
