#include "src/transfer/block_map.h"

#include <algorithm>

#include "src/base/check.h"
#include "src/kernels/shapes.h"

namespace tandem::transfer {
namespace {

constexpr int64_t kScaleBytes = sizeof(float);

}  // namespace

BlockMap::BlockMap(const model::KvLayout& from, const model::KvLayout& to)
    : from_tokens_(from.block_size),
      to_tokens_(to.block_size),
      element_bytes_(kernels::dtype_bytes(from.dtype)),
      head_dim_(from.head_dim) {
  CHECK_GT(from_tokens_, 0);
  CHECK_GT(to_tokens_, 0);
  CHECK_EQ(from.bytes_per_token, to.bytes_per_token);
  const bool has_scales = from.dtype == kernels::DType::kF8E4M3;
  if (from_tokens_ == to_tokens_) {
    add(from.bytes_per_token);
  } else if (from.kind == model::KvKind::kMla) {
    add(from.bytes_per_token - (has_scales ? kScaleBytes : 0));
    if (has_scales) add(kScaleBytes);
  } else {
    const bool is_woven = from_tokens_ % 2 != 0 || to_tokens_ % 2 != 0;
    for (int64_t head = 0; head < from.kv_heads; ++head) {
      for (int64_t pair = 0; pair < head_dim_ / 2; ++pair) add(2 * element_bytes_);
      if (head_dim_ % 2 != 0) add(element_bytes_);
      add(head_dim_ * element_bytes_, is_woven);
      if (has_scales) add(kScaleBytes);
      if (has_scales) add(kScaleBytes);
    }
  }
  const Strip& last = strips_.back();
  CHECK_EQ(last.from_offset + last.token_bytes * from_tokens_, from.block_bytes());
}

void BlockMap::add(int64_t token_bytes, bool is_woven) {
  Strip strip{0, 0, token_bytes, is_woven};
  if (!strips_.empty()) {
    strip.from_offset = strips_.back().from_offset + strips_.back().token_bytes * from_tokens_;
    strip.to_offset = strips_.back().to_offset + strips_.back().token_bytes * to_tokens_;
  }
  strips_.push_back(strip);
}

void BlockMap::find(int64_t block, int64_t begin, int64_t end, std::vector<CopyRun>& runs) const {
  auto strip = std::upper_bound(strips_.begin(), strips_.end(), begin,
                                [](int64_t offset, const Strip& s) { return offset < s.from_offset; });
  CHECK(strip != strips_.begin());
  for (--strip; begin < end; ++strip) {
    CHECK(strip != strips_.end());
    const int64_t until = std::min(end, strip->from_offset + strip->token_bytes * from_tokens_);
    if (strip->is_woven) {
      find_woven(*strip, block, begin - strip->from_offset, until - strip->from_offset, runs);
    } else {
      find_rows(*strip, block, begin - strip->from_offset, until - strip->from_offset, runs);
    }
    begin = until;
  }
}

// `begin` and `end` count from the start of the strip.
void BlockMap::find_rows(const Strip& strip, int64_t block, int64_t begin, int64_t end,
                         std::vector<CopyRun>& runs) const {
  const int64_t start = block * from_tokens_ * strip.token_bytes;  // of the strip in one without blocks
  const int64_t whole = to_tokens_ * strip.token_bytes;            // what a block of the receiver has of it
  while (begin < end) {
    const int64_t place = (start + begin) % whole;
    const int64_t bytes = std::min(end - begin, whole - place);
    runs.push_back({(start + begin) / whole, strip.to_offset + place, bytes});
    begin += bytes;
  }
}

// The inverse of kernels::pair_index on the sender's side, and the function itself on the receiver's.
void BlockMap::find_woven(const Strip& strip, int64_t block, int64_t begin, int64_t end,
                          std::vector<CopyRun>& runs) const {
  const int64_t paired = from_tokens_ / 2 * 2 * head_dim_;  // elements that lie by pairs
  while (begin < end) {
    const int64_t element = begin / element_bytes_;
    const int64_t inside = begin % element_bytes_;
    const bool has_partner = element < paired;
    const int64_t token = has_partner ? element / (2 * head_dim_) * 2 + element % 2 : from_tokens_ - 1;
    const int64_t dim = has_partner ? element % (2 * head_dim_) / 2 : element - paired;
    const int64_t position = block * from_tokens_ + token;
    const int64_t index = kernels::pair_index(position % to_tokens_, to_tokens_, dim, head_dim_);
    const int64_t bytes = std::min(end - begin, element_bytes_ - inside);
    runs.push_back({position / to_tokens_, strip.to_offset + index * element_bytes_ + inside, bytes});
    begin += bytes;
  }
}

}  // namespace tandem::transfer
