// How many tokens each expert of each MoE layer was chosen for: what balancing decides on. Plain values; layers are
// counted among the MoE layers only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tandem::eplb {

// Bounds of what a file or a peer may claim.
inline constexpr int64_t kMaxLayers = 1024;
inline constexpr int64_t kMaxExperts = 4096;
inline constexpr int64_t kMaxRanks = 4096;
inline constexpr int64_t kMaxSlotsPerLayer = 16384;

class ExpertLoad {
 public:
  ExpertLoad() = default;
  ExpertLoad(int64_t num_layers, int64_t num_experts);

  int64_t num_layers() const { return num_layers_; }
  int64_t num_experts() const { return num_experts_; }
  bool has_shape_of(const ExpertLoad& other) const {
    return num_layers_ == other.num_layers_ && num_experts_ == other.num_experts_;
  }
  std::span<int64_t> layer(int64_t index);
  std::span<const int64_t> layer(int64_t index) const;
  std::span<const int64_t> all() const { return tokens_; }
  int64_t total() const;

  void add(const ExpertLoad& other);  // of the same shape
  void subtract(const ExpertLoad& other);
  void clear();
  bool operator==(const ExpertLoad&) const = default;

 private:
  int64_t num_layers_ = 0;
  int64_t num_experts_ = 0;
  std::vector<int64_t> tokens_;  // [layers, experts]
};

// Loads of one window, oldest first, all of one shape.
using LoadSeries = std::vector<ExpertLoad>;
ExpertLoad sum_of(std::span<const ExpertLoad> loads);  // of at least one
// The group's series from those of its ranks: entry i is the sum of entries i. Ranks step together, so all are as long.
LoadSeries sum_over_ranks(std::span<const LoadSeries> ranks);

// Tokens of prompts and of answers choose differently, and are computed by different workers when the roles are split.
enum class Phase : uint8_t { kPrompt, kGenerated };
inline constexpr Phase kPhases[] = {Phase::kPrompt, Phase::kGenerated};
const char* phase_name(Phase phase);  // "prompt", "generated"

struct PhasedLoad {
  ExpertLoad prompt;
  ExpertLoad generated;

  PhasedLoad() = default;
  PhasedLoad(int64_t num_layers, int64_t num_experts)
      : prompt(num_layers, num_experts), generated(num_layers, num_experts) {}
  ExpertLoad& of(Phase phase) { return phase == Phase::kPrompt ? prompt : generated; }
  const ExpertLoad& of(Phase phase) const { return phase == Phase::kPrompt ? prompt : generated; }
  bool operator==(const PhasedLoad&) const = default;
};

}  // namespace tandem::eplb
