// Time as the program sees it. Production uses SteadyClock; tests and simulation use ManualClock.
#pragma once

#include <cstdint>
#include <string>

namespace tandem {

class Clock {
 public:
  virtual ~Clock() = default;
  // Microseconds since an arbitrary start; never goes back.
  virtual int64_t now_us() const = 0;
};

class SteadyClock final : public Clock {
 public:
  int64_t now_us() const override;
};

class ManualClock final : public Clock {
 public:
  int64_t now_us() const override { return now_us_; }
  void advance_us(int64_t delta_us) { now_us_ += delta_us; }

 private:
  int64_t now_us_ = 0;
};

// Seconds since 1970 for API fields such as `created`.
int64_t unix_time_s();

// `bytes` random bytes from the kernel as lower-case hex; for ids and nonces.
std::string random_hex(size_t bytes);
uint64_t random_u64();

}  // namespace tandem
