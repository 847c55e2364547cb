// An order to the other tensor ranks as numbers on their way.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/base/result.h"
#include "src/model/batch.h"

namespace tandem::tp {

// What has changed in the first rank's cache, since its last order, that no step has computed.
struct CacheNews {
  std::vector<BlockId> received;  // their KV has come from another worker; their bytes follow the order
  std::vector<BlockId> filled;    // their KV is made up (KvCache::fill)
  float fill_value = 0;
};

// What the first tensor rank tells the others before a step.
struct StepOrder {
  model::Batch batch;  // without tokens: compute for the other data ranks only
  CacheNews news;
  bool has_part = false;  // the first rank's cache is a part of one that all share (KvCache::is_part)
};

// [count of all numbers behind this one, …].
std::vector<int32_t> write_order(const model::Batch& batch, const CacheNews& news, bool has_part);
// The numbers behind the count. An error says that they are no order: the ranks do not run the same program.
Result<StepOrder> read_order(std::span<const int32_t> numbers);

}  // namespace tandem::tp
