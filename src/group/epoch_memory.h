// The shared memory of one epoch as one rank sees it: its own region, made afresh, and those of the ranks of its node,
// mapped. A late writer of an older epoch writes into an older region, which nobody reads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "src/base/result.h"
#include "src/comm/shared_region.h"
#include "src/group/mapped_fabric.h"
#include "src/group/messages.h"

namespace tandem::group {

class EpochMemory {
 public:
  // Makes the region of `rank`; `bell` is that of its engine thread.
  static Result<std::unique_ptr<EpochMemory>> make(RankId rank, int32_t size, int64_t window_bytes,
                                                   const comm::SharedRegion& bell);

  // How others open it; without the network's part.
  WindowAddress address() const;
  // This rank's region: counters and pulse, then the window.
  std::byte* region() const { return own_.data(); }

  // Maps the region and the bell of another rank of this node. Errors name that rank.
  Status map(RankId rank, const WindowAddress& address);
  // Stands in for the region of a rank of another node, which cannot be mapped: only its pulse is used, and whoever
  // hears of that rank raises it.
  void stand_in(RankId rank);

  // One per rank, all mapped or stood in for by now.
  const std::vector<MappedRank>& ranks() const { return ranks_; }

 private:
  EpochMemory() = default;

  int64_t region_bytes_ = 0;
  uint64_t stamp_ = 0;
  comm::RegionAddress bell_;
  comm::SharedRegion own_;
  std::vector<comm::SharedRegion> opened_;
  std::vector<MappedRank> ranks_;
};

}  // namespace tandem::group
