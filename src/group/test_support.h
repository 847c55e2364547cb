// A group of ranks inside one process, for tests and benchmarks: one thread each, real windows, real bells.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "src/base/clock.h"
#include "src/comm/shared_region.h"
#include "src/group/mapped_fabric.h"
#include "src/group/rank_group.h"

namespace tandem::group {

class ThreadGroup {
 public:
  // `bells`: of engine threads that live longer than the group; else its own.
  ThreadGroup(int32_t size, int64_t window_bytes, FabricLimits limits = {}, std::vector<std::byte*> bells = {},
              Epoch epoch = Epoch(1)) {
    std::vector<MappedRank> ranks;
    for (int32_t r = 0; r < size; ++r) {
      regions_.push_back(
          comm::SharedRegion::create("window", MappedFabric::region_bytes(size, window_bytes)).value());
      bells_.push_back(comm::SharedRegion::create("bell", comm::Bell::kBytes).value());
      ranks.push_back({regions_.back().data(), bells.empty() ? bells_.back().data() : bells[static_cast<size_t>(r)]});
    }
    for (int32_t r = 0; r < size; ++r) {
      fabrics_.push_back(std::make_unique<MappedFabric>(RankId(r), epoch, ranks, window_bytes, limits, clock_));
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

// One rank's view of a ThreadGroup, which a test gives and takes.
class TestRankGroup final : public RankGroup {
 public:
  TestRankGroup(RankId rank, int32_t size)
      : rank_(rank), size_(size), bell_memory_(comm::SharedRegion::create("bell", comm::Bell::kBytes).value()) {}

  // From the test's thread: the group forms over `fabric`.
  void form(MappedFabric& fabric) {
    const std::lock_guard<std::mutex> lock(mutex_);
    fabric_ = &fabric;
    why_.reset();
    bell_.ring();
  }
  void lose(const Error& why) {
    const std::lock_guard<std::mutex> lock(mutex_);
    lose_locked(why);
  }
  std::byte* bell_memory() { return bell_memory_.data(); }

  RankId rank() const override { return rank_; }
  int32_t size() const override { return size_; }
  comm::Bell& bell() override { return bell_; }
  Fabric* fabric() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return seen_ = fabric_;
  }
  void report(const Error& why, std::optional<RankId> /*suspect*/) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (fabric_ == seen_) lose_locked(why);
  }
  Status status() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (fabric_ != nullptr) return {};
    return why_.value_or(make_error(ErrorKind::kUnavailable, "the group has not formed yet"));
  }

 private:
  void lose_locked(const Error& why) {
    if (fabric_ != nullptr) fabric_->end(why);
    fabric_ = nullptr;
    why_ = why;
    bell_.ring();
  }

  const RankId rank_;
  const int32_t size_;
  comm::SharedRegion bell_memory_;
  comm::Bell bell_{bell_memory_.data()};
  mutable std::mutex mutex_;
  MappedFabric* fabric_ = nullptr;
  MappedFabric* seen_ = nullptr;  // by the engine
  std::optional<Error> why_;
};

}  // namespace tandem::group
