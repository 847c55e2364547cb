#include "src/group/mapped_fabric.h"

#include <sched.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "src/base/control_group.h"

namespace tandem::group {
namespace {

constexpr int64_t kAlignment = 64;
// While it waits a rank looks up this often, to show life and to see whether the other one does.
constexpr int64_t kLookUpUs = 50'000;

int64_t header_bytes(int32_t size) {
  const int64_t bytes = kAlignment + int64_t{size} * kNumChannels * static_cast<int64_t>(sizeof(uint64_t));
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

constexpr int kSpinLooks = 16;  // between two looks at the clock

bool has_processors_for(int64_t threads) {
  cpu_set_t set;
  CPU_ZERO(&set);
  const bool is_known = ::sched_getaffinity(0, sizeof set, &set) == 0;
  return is_known && CPU_COUNT(&set) >= threads && processor_quota() >= static_cast<double>(threads);
}

}  // namespace

const char* channel_name(Channel channel) {
  switch (channel) {
    case Channel::kStep: return "step";
    case Channel::kCounts: return "counts";
    case Channel::kDispatch: return "dispatch";
    case Channel::kCombine: return "combine";
    case Channel::kBarrier: return "barrier";
    case Channel::kWeights: return "weights";
    case Channel::kMove: return "move";
    case Channel::kReduce: return "reduce";
    case Channel::kShare: return "share";
    case Channel::kLogits: return "logits";
    case Channel::kOrders: return "orders";
    case Channel::kSecondCounts: return "second counts";
    case Channel::kSecondDispatch: return "second dispatch";
    case Channel::kSecondCombine: return "second combine";
  }
  return "unknown";
}

int64_t MappedFabric::region_bytes(int32_t size, int64_t window_bytes) { return header_bytes(size) + window_bytes; }

MappedFabric::MappedFabric(RankId rank, Epoch epoch, std::vector<MappedRank> ranks, int64_t window_bytes,
                           FabricLimits limits, const Clock& clock, int64_t num_threads)
    : rank_(rank),
      epoch_(epoch),
      ranks_(std::move(ranks)),
      window_bytes_(window_bytes),
      window_offset_(header_bytes(static_cast<int32_t>(ranks_.size()))),
      limits_(limits),
      spin_us_(has_processors_for(num_threads > 0 ? num_threads : std::ssize(ranks_)) ? limits.spin_us : 0),
      clock_(clock) {
  CHECK_LE(std::ssize(ranks_), kMaxRanks);
  CHECK_LT(rank.value, std::ssize(ranks_));
  for (const MappedRank& mapped : ranks_) {
    CHECK_EQ(reinterpret_cast<uintptr_t>(mapped.region) % kAlignment, 0U);
    bells_.emplace_back(mapped.bell);
  }
}

std::byte* MappedFabric::direct(RankId to) { return ranks_[static_cast<size_t>(to.value)].region + window_offset_; }

void MappedFabric::put(RankId to, int64_t offset, std::span<const std::byte> data) {
  CHECK_GE(offset, 0);
  CHECK_LE(offset + std::ssize(data), window_bytes_);
  std::memcpy(direct(to) + offset, data.data(), data.size());
}

void MappedFabric::signal(RankId to, Channel channel, uint64_t value) {
  counter(to, rank_, channel).store(value, std::memory_order_release);
  if (to != rank_) bells_[static_cast<size_t>(to.value)].ring();
}

uint64_t MappedFabric::signalled(RankId from, Channel channel) const {
  return counter(rank_, from, channel).load(std::memory_order_acquire);
}

Status MappedFabric::wait(RankId from, Channel channel, uint64_t value) {
  if (signalled(from, channel) >= value || spin(from, channel, value)) return status();
  return wait_asleep(from, channel, value);
}

// Whether the counter got there.
bool MappedFabric::spin(RankId from, Channel channel, uint64_t value) const {
  if (spin_us_ <= 0) return false;
  const int64_t end_us = clock_.now_us() + spin_us_;
  do {
    for (int i = 0; i < kSpinLooks; ++i) {
      if (signalled(from, channel) >= value) return true;
      __builtin_ia32_pause();
    }
  } while (!has_ended_ && clock_.now_us() < end_us);
  return false;
}

Status MappedFabric::wait_asleep(RankId from, Channel channel, uint64_t value) {
  comm::Bell& bell = bells_[static_cast<size_t>(rank_.value)];
  const int64_t begin_us = clock_.now_us();
  int64_t moved_us = begin_us;
  uint64_t seen_pulse = pulse(from).load(std::memory_order_relaxed);
  while (true) {
    const uint32_t rung = bell.count();
    if (has_ended_) return status();
    if (signalled(from, channel) >= value) return {};
    beat();
    const int64_t now_us = clock_.now_us();
    const uint64_t now_pulse = pulse(from).load(std::memory_order_relaxed);
    if (now_pulse != seen_pulse) {
      seen_pulse = now_pulse;
      moved_us = now_us;
    }
    if (now_us - moved_us >= limits_.rank_timeout_us) {
      return make_error(ErrorKind::kUnavailable,
                        "rank {} has shown no sign of life for {:.1f} s while rank {} waited for its {} (--rank-timeout)",
                        from, static_cast<double>(now_us - moved_us) * 1e-6, rank_, channel_name(channel));
    }
    if (now_us - begin_us >= limits_.rank_timeout_us * FabricLimits::kMostTimeouts) {
      return make_error(ErrorKind::kUnavailable,
                        "rank {} runs, but rank {} has waited {:.1f} s for its {}; see the log of rank {}", from, rank_,
                        static_cast<double>(now_us - begin_us) * 1e-6, channel_name(channel), from);
    }
    bell.wait(rung, std::min(kLookUpUs, limits_.rank_timeout_us));
  }
}

void MappedFabric::beat() { pulse(rank_).fetch_add(1, std::memory_order_relaxed); }

void MappedFabric::end(const Error& why) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!why_) why_ = why;
  }
  has_ended_ = true;
  bells_[static_cast<size_t>(rank_.value)].ring();
}

Status MappedFabric::status() const {
  if (!has_ended_) return {};
  const std::lock_guard<std::mutex> lock(mutex_);
  return *why_;
}

std::span<std::byte> MappedFabric::window_in(std::byte* region, int32_t size, int64_t window_bytes) {
  return {region + header_bytes(size), static_cast<size_t>(window_bytes)};
}

MappedFabric::Counter& MappedFabric::counter_in(std::byte* region, RankId of, Channel channel) {
  const int64_t index = int64_t{of.value} * kNumChannels + static_cast<int64_t>(channel);
  return *reinterpret_cast<Counter*>(region + kAlignment + index * static_cast<int64_t>(sizeof(Counter)));
}

}  // namespace tandem::group
