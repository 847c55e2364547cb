#include "src/eplb/expert_load.h"

#include <algorithm>
#include <numeric>

#include "src/base/check.h"

namespace tandem::eplb {

ExpertLoad::ExpertLoad(int64_t num_layers, int64_t num_experts)
    : num_layers_(num_layers), num_experts_(num_experts), tokens_(static_cast<size_t>(num_layers * num_experts)) {
  CHECK_GE(num_layers, 0);
  CHECK_LE(num_layers, kMaxLayers);
  CHECK_GE(num_experts, 0);
  CHECK_LE(num_experts, kMaxExperts);
}

std::span<int64_t> ExpertLoad::layer(int64_t index) {
  CHECK_LT(index, num_layers_);
  return std::span(tokens_).subspan(static_cast<size_t>(index * num_experts_), static_cast<size_t>(num_experts_));
}

std::span<const int64_t> ExpertLoad::layer(int64_t index) const {
  CHECK_LT(index, num_layers_);
  return std::span(tokens_).subspan(static_cast<size_t>(index * num_experts_), static_cast<size_t>(num_experts_));
}

int64_t ExpertLoad::total() const { return std::accumulate(tokens_.begin(), tokens_.end(), int64_t{0}); }

void ExpertLoad::add(const ExpertLoad& other) {
  CHECK(has_shape_of(other));
  for (size_t i = 0; i < tokens_.size(); ++i) tokens_[i] += other.tokens_[i];
}

void ExpertLoad::subtract(const ExpertLoad& other) {
  CHECK(has_shape_of(other));
  for (size_t i = 0; i < tokens_.size(); ++i) tokens_[i] -= other.tokens_[i];
}

void ExpertLoad::clear() { std::fill(tokens_.begin(), tokens_.end(), 0); }

ExpertLoad sum_of(std::span<const ExpertLoad> loads) {
  CHECK(!loads.empty());
  ExpertLoad sum = loads.front();
  for (const ExpertLoad& load : loads.subspan(1)) sum.add(load);
  return sum;
}

LoadSeries sum_over_ranks(std::span<const LoadSeries> ranks) {
  CHECK(!ranks.empty());
  LoadSeries sum = ranks.front();
  for (const LoadSeries& series : ranks.subspan(1)) {
    CHECK_EQ(series.size(), sum.size());
    for (size_t i = 0; i < sum.size(); ++i) sum[i].add(series[i]);
  }
  return sum;
}

const char* phase_name(Phase phase) { return phase == Phase::kPrompt ? "prompt" : "generated"; }

}  // namespace tandem::eplb
