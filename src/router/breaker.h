// Keeps requests away from what has just failed several times, and lets one try now and then. No clock: times are
// given.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tandem::router {

struct BreakerLimits {
  int failures_to_open = 5;      // in a row
  int64_t open_us = 10'000'000;  // nothing goes there for this long
  int64_t trial_us = 1'000'000;  // then one request in this time, until one succeeds
};

class CircuitBreaker {
 public:
  explicit CircuitBreaker(BreakerLimits limits) : limits_(limits) {}

  bool is_closed() const { return failures_ < limits_.failures_to_open; }
  bool allows(int64_t now_us) const { return is_closed() || now_us >= next_us_; }
  // When allows() may become true; 0 if it is.
  int64_t next_us() const { return is_closed() ? 0 : next_us_; }
  // A request goes there.
  void begin(int64_t now_us) {
    if (!is_closed()) next_us_ = std::max(next_us_, now_us + limits_.trial_us);
  }
  // It was away and is there again, perhaps as another process: a request may try it at once.
  void came_back(int64_t now_us) { next_us_ = std::min(next_us_, now_us); }
  // True if it has just opened or closed.
  bool record(bool success, int64_t now_us) {
    const bool was_closed = is_closed();
    failures_ = success ? 0 : std::min(failures_ + 1, limits_.failures_to_open);
    if (!is_closed()) next_us_ = now_us + limits_.open_us;
    return was_closed != is_closed();
  }

 private:
  BreakerLimits limits_;
  int failures_ = 0;
  int64_t next_us_ = 0;
};

// Bounds repeats to a share of the requests, so that a sick cluster is not asked several times for everything.
class RetryBudget {
 public:
  // A repeat may be made for `share` of the requests, and kBurst at once.
  explicit RetryBudget(double share) : share_(share) {}

  void request() { tokens_ = std::min(tokens_ + share_, kBurst); }
  bool take() {
    if (tokens_ < 1) return false;
    tokens_ -= 1;
    return true;
  }

 private:
  static constexpr double kBurst = 100;
  double share_;
  double tokens_ = kBurst;
};

}  // namespace tandem::router
