// One layer's placement while it is being improved: what `swift` and `flash` share. No rank ever gets a second copy of
// an expert.
//
// A rank's weight is mean + z * deviation of its tokens over the samples of the window; the deviation of a sum of
// experts is computed from the samples themselves, so that experts which rise together count as such.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/eplb/expert_load.h"

namespace tandem::eplb {

// What one layer's experts ask for.
struct LayerDemand {
  std::vector<double> mean;        // [experts] tokens per sample
  std::vector<double> deviations;  // [experts, samples]: sample - mean; empty when only the mean counts
  size_t num_samples = 0;          // columns of `deviations`
  double z = 0;

  // Of an expert as a whole: mean + z * deviation.
  std::vector<double> weights() const;
  static LayerDemand of_mean(std::span<const ExpertLoad> window, int64_t layer);
  static LayerDemand of_samples(std::span<const ExpertLoad> window, int64_t layer, double z);
};

struct SwapLimits {
  double good_enough = 1.005;  // stop when the heaviest rank has at most this times the mean weight
  double least_gain = 0.0005;  // a swap must lower the heaviest weight by this share of the mean
  int64_t swaps_per_rank = 8;  // at most, times ranks
};

class RankFill {
 public:
  static constexpr int32_t kEmpty = -1;

  // Slots may be kEmpty.
  RankFill(const LayerDemand& demand, int64_t num_ranks, std::span<const int32_t> expert_of_slot);

  const std::vector<int32_t>& slots() const { return slots_; }
  const std::vector<int32_t>& copies() const { return copies_; }
  bool has_duplicates() const;
  double peak() const;         // the heaviest rank's weight
  double mean_peak() const;    // mean over the samples of the heaviest rank's tokens: what a step waits for
  double mean_tokens() const;  // of a rank

  // Empties every slot that holds an expert its rank has already.
  void drop_duplicates();
  // Makes the copies as many as asked and fills every empty slot. Surplus copies leave the heaviest ranks; missing ones
  // go, heaviest first, to the lightest rank with room. `copies` sum up to the slots, at most one per rank and expert.
  void set_copies(std::span<const int32_t> copies);
  // Lowers the heaviest rank by swaps with others, the best first.
  void swap_experts(const SwapLimits& limits);

 private:
  struct Swap {
    size_t slot = 0;
    size_t other = 0;
    double weight = 0;  // of the heavier of the two ranks afterwards
  };
  size_t rank_of(size_t slot) const { return slot / per_rank_; }
  bool holds(size_t rank, int32_t expert) const {
    return held_[rank * num_experts_ + static_cast<size_t>(expert)] != 0;
  }
  double weight_of(double mean, double square) const;
  void recompute();
  void recompute_rank(size_t rank);
  void put(size_t slot, int32_t expert);
  void take(size_t slot);
  void fill(int32_t expert);
  void fill_by_moving(int32_t expert);
  void find_swaps_with(size_t heavy, size_t rank, Swap& best) const;
  double weight_after(size_t rank, int32_t leaves, int32_t comes) const;

  const LayerDemand* demand_;
  std::vector<double> expert_weights_;
  size_t num_ranks_;
  size_t num_experts_;
  size_t per_rank_;
  std::vector<int32_t> slots_;
  std::vector<int32_t> copies_;     // [experts]: by which an expert's tokens are shared
  std::vector<int32_t> held_;       // [ranks, experts]: copies
  std::vector<int32_t> empty_;      // [ranks]: empty slots
  std::vector<double> means_;       // [ranks]
  std::vector<double> deviations_;  // [ranks, samples]
  std::vector<double> weights_;     // [ranks]
};

}  // namespace tandem::eplb
