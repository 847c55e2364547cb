// The ranks of one line of `tandem bench a2a`: processes that this one forks, and the memory that they share with it.
#pragma once

#include <vector>

#include "src/bench/a2a_rank.h"
#include "src/comm/shared_region.h"

namespace tandem::bench {

// What the ranks have written.
class A2aGroup {
 public:
  // Forks a process for each rank and returns when all have ended. Windows are of `window_bytes`.
  static Result<A2aGroup> run(const A2aRankOptions& options, A2aOver over, int64_t ranks, int64_t window_bytes);

  const A2aBoard& board() const { return *reinterpret_cast<const A2aBoard*>(board_.data()); }
  int64_t size() const { return std::ssize(records_); }
  const A2aRecord& record(int64_t rank) const {
    return *reinterpret_cast<const A2aRecord*>(records_[static_cast<size_t>(rank)].data());
  }

 private:
  comm::SharedRegion board_;
  std::vector<comm::SharedRegion> records_;
};

}  // namespace tandem::bench
