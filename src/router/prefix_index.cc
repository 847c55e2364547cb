#include "src/router/prefix_index.h"

#include <algorithm>

namespace tandem::router {
namespace {

// FNV-1a by words, finished by a multiply and shift; collisions only make a guess worse.
uint64_t combine(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x100000001B3ULL;
  return hash ^ (hash >> 29U);
}

}  // namespace

std::vector<uint64_t> hash_prompt_blocks(std::span<const TokenId> prompt, std::string_view salt) {
  uint64_t hash = 0xCBF29CE484222325ULL;
  for (const char c : salt) hash = combine(hash, static_cast<unsigned char>(c));
  std::vector<uint64_t> blocks;
  blocks.reserve(prompt.size() / PrefixIndex::kBlockTokens);
  for (size_t i = 0; i < prompt.size(); ++i) {
    hash = combine(hash, static_cast<uint32_t>(prompt[i]));
    if ((i + 1) % PrefixIndex::kBlockTokens == 0) blocks.push_back(hash);
  }
  return blocks;
}

int64_t PrefixIndex::cached_tokens(std::span<const uint64_t> blocks) const {
  int64_t count = 0;
  for (const uint64_t block : blocks) {
    if (!young_.contains(block) && !old_.contains(block)) break;
    ++count;
  }
  return count * kBlockTokens;
}

void PrefixIndex::add(std::span<const uint64_t> blocks) {
  if (young_.size() + blocks.size() > kMaxBlocks) {
    old_ = std::move(young_);
    young_.clear();
  }
  const size_t count = std::min(blocks.size(), kMaxBlocks);
  young_.insert(blocks.begin(), blocks.begin() + static_cast<int64_t>(count));
}

void PrefixIndex::clear() {
  young_.clear();
  old_.clear();
}

}  // namespace tandem::router
