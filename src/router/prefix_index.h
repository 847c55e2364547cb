// What the router believes to be in the prefix caches of its workers: the prompts it has sent there. A guess that
// costs nothing to be wrong: it only steers the choice of a worker.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "src/base/ids.h"

namespace tandem::router {

// Hashes of the whole blocks at the start of a prompt, each over everything before its end.
std::vector<uint64_t> hash_prompt_blocks(std::span<const TokenId> prompt, std::string_view salt);

// The prompts of one worker. Holds at most 2 * kMaxBlocks hashes: the younger half, and the half before it.
class PrefixIndex {
 public:
  static constexpr int64_t kBlockTokens = 16;
  static constexpr size_t kMaxBlocks = 1UL << 16U;

  // Tokens at the start of the prompt that were sent there lately.
  int64_t cached_tokens(std::span<const uint64_t> blocks) const;
  void add(std::span<const uint64_t> blocks);
  // The worker has been restarted.
  void clear();

 private:
  std::unordered_set<uint64_t> young_;
  std::unordered_set<uint64_t> old_;
};

}  // namespace tandem::router
