// Few moves from the current placement: copies are shifted from experts that no longer need them, then the heaviest
// rank swaps experts with others until the layer is even. After the description of the incremental "swift balancer" of
// vLLM for Ascend (github.com/vllm-project/vllm-ascend, user guide of its expert load balance); thresholds are our own,
// measured.
#include <algorithm>

#include "src/eplb/policy.h"
#include "src/eplb/rank_fill.h"
#include "src/eplb/replicate.h"

namespace tandem::eplb {
namespace {

// A layer whose fullest rank has at most this times the mean is left alone.
constexpr double kEvenEnough = 1.01;
// The whole is left alone unless the sum of the layers' peaks falls below this share: moves are not free.
constexpr double kWorthMoving = 0.95;
// A copy that carries at most this share of a rank's mean tokens can be packed without another copy of its expert.
constexpr double kLightCopy = 0.5;

struct LayerPeaks {
  double before = 0;
  double after = 0;
  bool had_duplicates = false;
};

LayerPeaks place_layer(const RebalanceInput& input, int64_t layer, std::span<int32_t> next) {
  const LayerDemand demand = LayerDemand::of_mean(input.window, layer);
  RankFill fill(demand, input.layout.num_ranks, next);
  LayerPeaks peaks{fill.peak(), fill.peak(), fill.has_duplicates()};
  const double mean = fill.mean_tokens();
  if (!peaks.had_duplicates && peaks.before <= kEvenEnough * mean) return peaks;
  fill.drop_duplicates();
  std::vector<int32_t> copies = fill.copies();
  int64_t missing = input.layout.num_slots();
  for (const int32_t count : copies) missing -= count;
  for (; missing > 0; --missing) {
    size_t best = copies.size();
    for (size_t e = 0; e < copies.size(); ++e) {
      if (copies[e] >= input.layout.num_ranks) continue;
      if (best == copies.size() || demand.mean[e] / copies[e] > demand.mean[best] / copies[best]) best = e;
    }
    ++copies[best];
  }
  fill.set_copies(shift_copies(demand.mean, std::move(copies), input.layout.num_ranks, kLightCopy * mean));
  fill.swap_experts({});
  if (!peaks.had_duplicates && fill.peak() >= peaks.before) return peaks;
  peaks.after = fill.peak();
  std::copy(fill.slots().begin(), fill.slots().end(), next.begin());
  return peaks;
}

}  // namespace

Placement place_swift(const RebalanceInput& input) {
  Placement next = input.current;
  double before = 0;
  double after = 0;
  bool had_duplicates = false;
  for (int64_t l = 0; l < next.num_layers(); ++l) {
    const LayerPeaks peaks = place_layer(input, l, next.layer(l));
    before += peaks.before;
    after += peaks.after;
    had_duplicates = had_duplicates || peaks.had_duplicates;
  }
  return had_duplicates || after < kWorthMoving * before ? next : input.current;
}

}  // namespace tandem::eplb
