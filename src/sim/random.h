// The random numbers of a simulation: small, fast and the same on every machine (the distributions of <random> are
// not).
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/base/check.h"

namespace tandem::sim {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // splitmix64
  uint64_t next() {
    uint64_t x = (state_ += 0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }
  // 0 … count - 1.
  size_t below(size_t count) { return static_cast<size_t>(next() % count); }
  // first … last.
  int64_t range(int64_t first, int64_t last) {
    CHECK_LE(first, last);
    return first + static_cast<int64_t>(next() % static_cast<uint64_t>(last - first + 1));
  }
  bool chance(double probability) {
    return probability > 0 && static_cast<double>(next() >> 11) * 0x1p-53 < probability;
  }

 private:
  uint64_t state_;
};

}  // namespace tandem::sim
