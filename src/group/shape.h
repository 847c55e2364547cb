// What the members of a rank group agree on.
#pragma once

#include <cstdint>
#include <string>

namespace tandem::group {

// Ranks are numbered 0 … size() - 1; rank r is tensor rank r % tensor of data rank r / tensor.
struct GroupShape {
  int32_t data = 1;    // --data-parallel-size
  int32_t tensor = 1;  // --tensor-parallel-size

  int32_t size() const { return data * tensor; }
  bool operator==(const GroupShape&) const = default;
};

// Something that must be the same on all ranks, e.g. {"model", "3f9c…"}. A rank whose value differs is refused, and the
// refusal prints the name and both values.
struct Fact {
  std::string name;
  std::string value;
  bool operator==(const Fact&) const = default;
};

// Bounds of --rank-timeout.
inline constexpr int64_t kMinRankTimeoutUs = 100'000;
inline constexpr int64_t kMaxRankTimeoutUs = 3'600'000'000;

inline constexpr int64_t kMaxFacts = 64;
inline constexpr int64_t kMaxFactBytes = 1024;  // of a name and of a value

}  // namespace tandem::group
