// Names of prompt prefixes, one per full block: hash(parent, tokens), the first parent being the salt's own hash.
// Two blocks have the same name only if every token up to their end, and the salt, are the same.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "src/base/hash.h"
#include "src/base/ids.h"

namespace tandem::kv {

// Grows with a sequence: names are computed once per block.
class PrefixHashes {
 public:
  PrefixHashes(int64_t block_size, std::string_view salt);

  // Names of the full blocks of tokens[0, count); computes what is missing. `tokens` only ever grows.
  std::span<const Hash256> extend(std::span<const TokenId> tokens, int64_t count);
  // The first `num_blocks` names, which extend() has computed before.
  std::span<const Hash256> known(int64_t num_blocks) const;

 private:
  int64_t block_size_;
  Hash256 root_;
  std::vector<Hash256> hashes_;
};

}  // namespace tandem::kv
