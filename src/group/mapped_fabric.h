// The fabric of ranks whose windows are all mapped: processes of one host, or threads of one process. NetworkFabric
// adds ranks of other hosts.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "src/base/clock.h"
#include "src/comm/bell.h"
#include "src/group/fabric.h"

namespace tandem::group {

struct MappedRank {
  std::byte* region = nullptr;  // MappedFabric::region_bytes() of that rank, aligned to 64, zeroed
  std::byte* bell = nullptr;    // comm::Bell::kBytes, of that rank's engine thread
};

struct FabricLimits {
  int64_t rank_timeout_us = 10'000'000;  // without a sign of life from whom we wait for
  // A rank that shows life but does not send what we wait for is given up after this many time-outs.
  static constexpr int64_t kMostTimeouts = 6;
  // How long a wait looks before it sleeps: to sleep and wake takes longer than a small exchange. Only as long as this
  // process may use as many processors as the group has threads here: else it would take them from those it waits for.
  int64_t spin_us = 100;
};

class MappedFabric : public Fabric {
 public:
  // What a rank's region must hold: its counters and pulse, then its window.
  static int64_t region_bytes(int32_t size, int64_t window_bytes);

  // The memory must outlive the fabric. `num_threads`: of the group on this host; 0: one for each rank.
  MappedFabric(RankId rank, Epoch epoch, std::vector<MappedRank> ranks, int64_t window_bytes, FabricLimits limits,
               const Clock& clock, int64_t num_threads = 0);

  RankId rank() const override { return rank_; }
  int32_t size() const override { return static_cast<int32_t>(ranks_.size()); }
  Epoch epoch() const override { return epoch_; }
  std::span<std::byte> window() override { return {direct(rank_), static_cast<size_t>(window_bytes_)}; }
  std::byte* direct(RankId to) override;
  void put(RankId to, int64_t offset, std::span<const std::byte> data) override;
  Status flush() override { return {}; }
  void signal(RankId to, Channel channel, uint64_t value) override;
  uint64_t signalled(RankId from, Channel channel) const override;
  Status wait(RankId from, Channel channel, uint64_t value) override;
  void beat() override;
  void end(const Error& why) override;
  Status status() const override;

  using Counter = std::atomic<uint64_t>;
  static_assert(Counter::is_always_lock_free);
  // In a region: its window, the pulse of its rank, and the counter that rank `of` raises there.
  static std::span<std::byte> window_in(std::byte* region, int32_t size, int64_t window_bytes);
  static Counter& pulse_in(std::byte* region) { return *reinterpret_cast<Counter*>(region); }
  static Counter& counter_in(std::byte* region, RankId of, Channel channel);

 protected:
  comm::Bell& own_bell() { return bells_[static_cast<size_t>(rank_.value)]; }
  int64_t window_bytes() const { return window_bytes_; }
  const FabricLimits& limits() const { return limits_; }
  const Clock& clock() const { return clock_; }

 private:
  Counter& counter(RankId at, RankId of, Channel channel) const {
    return counter_in(ranks_[static_cast<size_t>(at.value)].region, of, channel);
  }
  Counter& pulse(RankId of) const { return pulse_in(ranks_[static_cast<size_t>(of.value)].region); }
  bool spin(RankId from, Channel channel, uint64_t value) const;
  Status wait_asleep(RankId from, Channel channel, uint64_t value);

  const RankId rank_;
  const Epoch epoch_;
  const std::vector<MappedRank> ranks_;
  const int64_t window_bytes_;
  const int64_t window_offset_;
  const FabricLimits limits_;
  const int64_t spin_us_;
  const Clock& clock_;
  std::vector<comm::Bell> bells_;
  std::atomic<bool> has_ended_ = false;
  mutable std::mutex mutex_;
  std::optional<Error> why_;
};

}  // namespace tandem::group
