// Bounds of an exchange, and how counters carry numbers beside the exchange they belong to.
#pragma once

#include <cstdint>

namespace tandem::ep {

inline constexpr int kCountBits = 24;
inline constexpr int64_t kMaxRows = (int64_t{1} << kCountBits) - 1;  // of a step of one rank
inline constexpr int64_t kMaxRounds = int64_t{1} << 16;              // of one exchange
inline constexpr int64_t kMaxSlotNumber = (int64_t{1} << 31) - 1;    // slots are numbered in 32 bits

// A counter's value: sequence numbers grow, so values do, and a count or a round rides below.
inline constexpr uint64_t count_value(uint64_t sequence, int64_t count) {
  return (sequence << kCountBits) | static_cast<uint64_t>(count);
}
inline constexpr uint64_t sequence_of(uint64_t value) { return value >> kCountBits; }
inline constexpr int64_t count_of(uint64_t value) { return static_cast<int64_t>(value & static_cast<uint64_t>(kMaxRows)); }
// round: 0 … kMaxRounds
inline constexpr uint64_t round_value(uint64_t sequence, int64_t round) { return count_value(sequence, round); }

}  // namespace tandem::ep
