// A group of ranks inside one process, for tests and benchmarks: one thread each, real windows, real bells.
#pragma once

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "src/base/clock.h"
#include "src/comm/shared_region.h"
#include "src/group/mapped_fabric.h"

namespace tandem::group {

class ThreadGroup {
 public:
  ThreadGroup(int32_t size, int64_t window_bytes, FabricLimits limits = {}) {
    std::vector<MappedRank> ranks;
    for (int32_t r = 0; r < size; ++r) {
      regions_.push_back(
          comm::SharedRegion::create("window", MappedFabric::region_bytes(size, window_bytes)).value());
      bells_.push_back(comm::SharedRegion::create("bell", comm::Bell::kBytes).value());
      ranks.push_back({regions_.back().data(), bells_.back().data()});
    }
    for (int32_t r = 0; r < size; ++r) {
      fabrics_.push_back(std::make_unique<MappedFabric>(RankId(r), Epoch(1), ranks, window_bytes, limits, clock_));
    }
  }

  int32_t size() const { return static_cast<int32_t>(fabrics_.size()); }
  MappedFabric& fabric(int32_t rank) { return *fabrics_[static_cast<size_t>(rank)]; }
  std::byte* bell(int32_t rank) { return bells_[static_cast<size_t>(rank)].data(); }

  // Runs `body` once per rank, each on its own thread, and waits for all.
  void run(const std::function<void(Fabric&)>& body) {
    std::vector<std::thread> threads;
    for (const std::unique_ptr<MappedFabric>& fabric : fabrics_) threads.emplace_back([&] { body(*fabric); });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  SteadyClock clock_;
  std::vector<comm::SharedRegion> regions_;
  std::vector<comm::SharedRegion> bells_;
  std::vector<std::unique_ptr<MappedFabric>> fabrics_;
};

}  // namespace tandem::group
