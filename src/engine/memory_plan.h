// How many KV blocks fit beside the weights, decided before any weight is read. Pure.
#pragma once

#include <optional>

#include "src/base/memory_info.h"
#include "src/base/result.h"
#include "src/model/memory_needs.h"

namespace tandem::engine {

struct MemoryRequest {
  int64_t num_blocks = 0;  // 0: not given
  int64_t kv_bytes = 0;    // 0: not given
  double utilization = 0.9;
  bool fill = false;  // utilization was given: KV takes all that it leaves
};

struct MemoryPlan {
  int64_t num_blocks = 0;
  int64_t total_bytes = 0;  // weights, workspace and KV, or weights and staging while loading if that is more
};

// Without a given size, KV gets kDefaultKvBytes, or what one request of full length needs if that is more, or less if
// memory does not allow it. The pool always holds one request of full length, or such a request could never end.
inline constexpr int64_t kDefaultKvBytes = int64_t{1} << 30;
Result<MemoryPlan> plan_memory(const model::MemoryNeeds& needs, const MemoryRequest& request,
                               const AvailableMemory& available);

}  // namespace tandem::engine
