// When a process that died is started again. Pure; times in milliseconds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

namespace tandem::cluster {

class RestartPolicy {
 public:
  static constexpr int64_t kFirstDelayMs = 200;
  static constexpr int64_t kLongestDelayMs = 5'000;
  // A process that was ready for this long starts over at the first delay.
  static constexpr int64_t kStableMs = 10'000;
  static constexpr int kMaxFailures = 10;  // in a row, without ever having been ready

  // The process died, having been ready for `ready_ms` (0: it never was). The delay, or none if it has failed too
  // often. One that does become ready is of use meanwhile, whoever kills it, and is never given up.
  std::optional<int64_t> next_delay_ms(int64_t ready_ms) {
    deaths_ = ready_ms >= kStableMs ? 1 : deaths_ + 1;
    failures_ = ready_ms > 0 ? 0 : failures_ + 1;
    if (failures_ > kMaxFailures) return std::nullopt;
    return std::min(kFirstDelayMs << std::min(deaths_ - 1, 10), kLongestDelayMs);
  }

 private:
  int deaths_ = 0;    // in a row, without having been stable
  int failures_ = 0;  // in a row, without having been ready
};

}  // namespace tandem::cluster
