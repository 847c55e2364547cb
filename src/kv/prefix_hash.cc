#include "src/kv/prefix_hash.h"

#include "src/base/check.h"

namespace tandem::kv {

PrefixHashes::PrefixHashes(int64_t block_size, std::string_view salt)
    : block_size_(block_size), root_(Sha256().add("kv-prefix:").add(salt).finish()) {
  CHECK_GT(block_size, 0);
}

std::span<const Hash256> PrefixHashes::extend(std::span<const TokenId> tokens, int64_t count) {
  CHECK_LE(count, static_cast<int64_t>(tokens.size()));
  const size_t wanted = static_cast<size_t>(count / block_size_);
  while (hashes_.size() < wanted) {
    const Hash256& parent = hashes_.empty() ? root_ : hashes_.back();
    const std::span<const TokenId> block =
        tokens.subspan(hashes_.size() * static_cast<size_t>(block_size_), static_cast<size_t>(block_size_));
    hashes_.push_back(Sha256().add_value(parent.bytes).add(std::as_bytes(block)).finish());
  }
  return std::span<const Hash256>(hashes_).first(wanted);
}

std::span<const Hash256> PrefixHashes::known(int64_t num_blocks) const {
  CHECK_LE(num_blocks, static_cast<int64_t>(hashes_.size()));
  return std::span<const Hash256>(hashes_).first(static_cast<size_t>(num_blocks));
}

}  // namespace tandem::kv
