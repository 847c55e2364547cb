#include "src/router/policy.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "src/base/check.h"

namespace tandem::router {

WorkerId Policy::pick(std::span<const Candidate> candidates) {
  CHECK(!candidates.empty());
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const Candidate& candidate : candidates) least = std::min(least, candidate.tokens_in_flight);

  // The next after the last one picked, and the first one if none follows.
  std::optional<WorkerId> first;
  std::optional<WorkerId> next;
  for (const Candidate& candidate : candidates) {
    if (kind_ == PolicyKind::kLeastLoad && candidate.tokens_in_flight > least) continue;
    if (!first) first = candidate.worker;
    if (!next && candidate.worker > last_) next = candidate.worker;
  }
  last_ = next ? *next : *first;
  return last_;
}

}  // namespace tandem::router
