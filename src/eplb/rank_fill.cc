#include "src/eplb/rank_fill.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "src/base/check.h"
#include "src/eplb/placement.h"

namespace tandem::eplb {

std::vector<double> LayerDemand::weights() const {
  std::vector<double> weights = mean;
  for (size_t e = 0; num_samples > 0 && e < weights.size(); ++e) {
    double square = 0;
    for (size_t t = 0; t < num_samples; ++t) {
      const double deviation = deviations[e * num_samples + t];
      square += deviation * deviation;
    }
    weights[e] += z * std::sqrt(square / static_cast<double>(num_samples));
  }
  return weights;
}

LayerDemand LayerDemand::of_mean(std::span<const ExpertLoad> window, int64_t layer) {
  LayerDemand demand;
  demand.mean.assign(static_cast<size_t>(window.front().num_experts()), 0.0);
  for (const ExpertLoad& load : window) {
    const std::span<const int64_t> tokens = load.layer(layer);
    for (size_t e = 0; e < tokens.size(); ++e) demand.mean[e] += static_cast<double>(tokens[e]);
  }
  for (double& mean : demand.mean) mean /= static_cast<double>(window.size());
  return demand;
}

LayerDemand LayerDemand::of_samples(std::span<const ExpertLoad> window, int64_t layer, double z) {
  LayerDemand demand = of_mean(window, layer);
  if (window.size() < 2) return demand;
  demand.num_samples = window.size();
  demand.z = z;
  demand.deviations.resize(demand.mean.size() * demand.num_samples);
  for (size_t t = 0; t < window.size(); ++t) {
    const std::span<const int64_t> tokens = window[t].layer(layer);
    for (size_t e = 0; e < tokens.size(); ++e) {
      demand.deviations[e * demand.num_samples + t] = static_cast<double>(tokens[e]) - demand.mean[e];
    }
  }
  return demand;
}

RankFill::RankFill(const LayerDemand& demand, int64_t num_ranks, std::span<const int32_t> expert_of_slot)
    : demand_(&demand),
      expert_weights_(demand.weights()),
      num_ranks_(static_cast<size_t>(num_ranks)),
      num_experts_(demand.mean.size()),
      per_rank_(expert_of_slot.size() / num_ranks_),
      slots_(expert_of_slot.begin(), expert_of_slot.end()),
      copies_(num_experts_),
      held_(num_ranks_ * num_experts_),
      empty_(num_ranks_),
      means_(num_ranks_),
      deviations_(num_ranks_ * demand.num_samples),
      weights_(num_ranks_) {
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (slots_[s] == kEmpty) {
      ++empty_[rank_of(s)];
    } else {
      ++copies_[static_cast<size_t>(slots_[s])];
      ++held_[rank_of(s) * num_experts_ + static_cast<size_t>(slots_[s])];
    }
  }
  recompute();
}

bool RankFill::has_duplicates() const {
  return std::any_of(held_.begin(), held_.end(), [](int32_t copies) { return copies > 1; });
}

double RankFill::peak() const { return *std::max_element(weights_.begin(), weights_.end()); }

double RankFill::mean_tokens() const {
  return std::accumulate(demand_->mean.begin(), demand_->mean.end(), 0.0) / static_cast<double>(num_ranks_);
}

double RankFill::mean_peak() const {
  const size_t samples = demand_->num_samples;
  if (samples == 0) return *std::max_element(means_.begin(), means_.end());
  double sum = 0;
  for (size_t t = 0; t < samples; ++t) {
    double largest = 0;
    for (size_t r = 0; r < num_ranks_; ++r) largest = std::max(largest, means_[r] + deviations_[r * samples + t]);
    sum += largest;
  }
  return sum / static_cast<double>(samples);
}

double RankFill::weight_of(double mean, double square) const {
  if (demand_->num_samples == 0) return mean;
  return mean + demand_->z * std::sqrt(square / static_cast<double>(demand_->num_samples));
}

void RankFill::recompute() {
  for (size_t r = 0; r < num_ranks_; ++r) recompute_rank(r);
}

// From its slots, so that no error of many small updates adds up.
void RankFill::recompute_rank(size_t rank) {
  const size_t samples = demand_->num_samples;
  double* const deviations = deviations_.data() + rank * samples;
  std::fill_n(deviations, samples, 0.0);
  means_[rank] = 0;
  for (size_t s = rank * per_rank_; s < (rank + 1) * per_rank_; ++s) {
    if (slots_[s] == kEmpty) continue;
    const size_t expert = static_cast<size_t>(slots_[s]);
    const double share = 1.0 / copies_[expert];
    means_[rank] += demand_->mean[expert] * share;
    for (size_t t = 0; t < samples; ++t) deviations[t] += demand_->deviations[expert * samples + t] * share;
  }
  double square = 0;
  for (size_t t = 0; t < samples; ++t) square += deviations[t] * deviations[t];
  weights_[rank] = weight_of(means_[rank], square);
}

void RankFill::put(size_t slot, int32_t expert) {
  CHECK_EQ(slots_[slot], kEmpty);
  slots_[slot] = expert;
  ++held_[rank_of(slot) * num_experts_ + static_cast<size_t>(expert)];
  --empty_[rank_of(slot)];
}

void RankFill::take(size_t slot) {
  CHECK_NE(slots_[slot], kEmpty);
  --held_[rank_of(slot) * num_experts_ + static_cast<size_t>(slots_[slot])];
  ++empty_[rank_of(slot)];
  slots_[slot] = kEmpty;
}

void RankFill::drop_duplicates() {
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (slots_[s] == kEmpty) continue;
    const size_t expert = static_cast<size_t>(slots_[s]);
    if (held_[rank_of(s) * num_experts_ + expert] < 2) continue;
    take(s);
    --copies_[expert];
  }
  recompute();
}

void RankFill::set_copies(std::span<const int32_t> copies) {
  CHECK_EQ(std::accumulate(copies.begin(), copies.end(), int64_t{0}), static_cast<int64_t>(slots_.size()));
  for (size_t e = 0; e < num_experts_; ++e) {
    CHECK_GE(copies[e], 1);
    CHECK_LE(copies[e], static_cast<int32_t>(num_ranks_));
  }
  std::vector<int32_t> present = std::move(copies_);
  copies_.assign(copies.begin(), copies.end());
  recompute();
  for (size_t e = 0; e < num_experts_; ++e) {
    for (; present[e] > copies_[e]; --present[e]) {
      size_t heaviest = slots_.size();
      for (size_t s = 0; s < slots_.size(); ++s) {
        if (slots_[s] != static_cast<int32_t>(e)) continue;
        if (heaviest == slots_.size() || weights_[rank_of(s)] > weights_[rank_of(heaviest)]) heaviest = s;
      }
      take(heaviest);
      recompute_rank(rank_of(heaviest));
    }
  }
  std::vector<int32_t> missing;
  for (size_t e = 0; e < num_experts_; ++e) {
    missing.insert(missing.end(), static_cast<size_t>(copies_[e] - present[e]), static_cast<int32_t>(e));
  }
  const auto share = [&](int32_t e) {
    return expert_weights_[static_cast<size_t>(e)] / copies_[static_cast<size_t>(e)];
  };
  std::stable_sort(missing.begin(), missing.end(), [&](int32_t a, int32_t b) { return share(a) > share(b); });
  // By weights that add up: this is the heuristic; swap_experts knows how experts vary together.
  for (const int32_t expert : missing) fill(expert);
  recompute();
}

// Into an empty slot of the lightest rank that has one and not yet the expert.
void RankFill::fill(int32_t expert) {
  size_t lightest = num_ranks_;
  for (size_t r = 0; r < num_ranks_; ++r) {
    if (empty_[r] == 0 || holds(r, expert)) continue;
    if (lightest == num_ranks_ || weights_[r] < weights_[lightest]) lightest = r;
  }
  if (lightest == num_ranks_) return fill_by_moving(expert);
  size_t slot = lightest * per_rank_;
  while (slots_[slot] != kEmpty) ++slot;
  put(slot, expert);
  weights_[lightest] += expert_weights_[static_cast<size_t>(expert)] / copies_[static_cast<size_t>(expert)];
}

// All ranks with room have the expert already. A full rank without it exists, since there are fewer copies than ranks,
// and has an expert that the rank with room lacks, since it has more of them: that one moves over.
void RankFill::fill_by_moving(int32_t expert) {
  size_t to = 0;
  while (slots_[to] != kEmpty) ++to;
  const size_t room = rank_of(to);
  size_t from = slots_.size();
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (slots_[s] == kEmpty || holds(rank_of(s), expert) || holds(room, slots_[s])) continue;
    if (from == slots_.size() || weights_[rank_of(s)] < weights_[rank_of(from)]) from = s;
  }
  CHECK_LT(from, slots_.size());
  const int32_t moved = slots_[from];
  take(from);
  put(to, moved);
  put(from, expert);
  const auto share = [&](int32_t e) {
    return expert_weights_[static_cast<size_t>(e)] / copies_[static_cast<size_t>(e)];
  };
  weights_[room] += share(moved);
  weights_[rank_of(from)] += share(expert) - share(moved);
}

double RankFill::weight_after(size_t rank, int32_t leaves, int32_t comes) const {
  const size_t out = static_cast<size_t>(leaves);
  const size_t in = static_cast<size_t>(comes);
  const double out_share = 1.0 / copies_[out];
  const double in_share = 1.0 / copies_[in];
  const double mean = means_[rank] - demand_->mean[out] * out_share + demand_->mean[in] * in_share;
  const size_t samples = demand_->num_samples;
  double square = 0;
  for (size_t t = 0; t < samples; ++t) {
    const double deviation = deviations_[rank * samples + t] - demand_->deviations[out * samples + t] * out_share +
                             demand_->deviations[in * samples + t] * in_share;
    square += deviation * deviation;
  }
  return weight_of(mean, square);
}

void RankFill::find_swaps_with(size_t heavy, size_t rank, Swap& best) const {
  for (size_t a = heavy * per_rank_; a < (heavy + 1) * per_rank_; ++a) {
    const int32_t leaves = slots_[a];
    if (holds(rank, leaves)) continue;
    const double leaves_mean = demand_->mean[static_cast<size_t>(leaves)] / copies_[static_cast<size_t>(leaves)];
    for (size_t b = rank * per_rank_; b < (rank + 1) * per_rank_; ++b) {
      const int32_t comes = slots_[b];
      if (holds(heavy, comes)) continue;
      const double comes_mean = demand_->mean[static_cast<size_t>(comes)] / copies_[static_cast<size_t>(comes)];
      const double shift = leaves_mean - comes_mean;
      // A weight is at least its mean: most pairs need no sum over samples.
      if (means_[heavy] - shift >= best.weight || means_[rank] + shift >= best.weight) continue;
      const double other = weight_after(rank, comes, leaves);
      if (other >= best.weight) continue;
      const double weight = std::max(other, weight_after(heavy, leaves, comes));
      if (weight < best.weight) best = {a, b, weight};
    }
  }
}

void RankFill::swap_experts(const SwapLimits& limits) {
  const double mean = std::accumulate(weights_.begin(), weights_.end(), 0.0) / static_cast<double>(num_ranks_);
  const int64_t most = limits.swaps_per_rank * static_cast<int64_t>(num_ranks_);
  for (int64_t i = 0; i < most; ++i) {
    const auto heaviest = std::max_element(weights_.begin(), weights_.end());
    if (*heaviest <= limits.good_enough * mean) return;
    const size_t heavy = static_cast<size_t>(heaviest - weights_.begin());
    Swap best{0, 0, *heaviest - limits.least_gain * mean};
    const double bar = best.weight;
    for (size_t r = 0; r < num_ranks_; ++r) {
      if (r != heavy && weights_[r] < bar) find_swaps_with(heavy, r, best);
    }
    if (best.weight >= bar) return;
    const int32_t leaves = slots_[best.slot];
    const int32_t comes = slots_[best.other];
    take(best.slot);
    take(best.other);
    put(best.slot, comes);
    put(best.other, leaves);
    recompute_rank(heavy);
    recompute_rank(rank_of(best.other));
  }
}

}  // namespace tandem::eplb
