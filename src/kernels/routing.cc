#include "src/kernels/routing.h"

#include <vector>

#include "src/kernels/shapes.h"

namespace tandem::kernels {
namespace {

// Index of the largest value among those not taken; ties to the lowest index.
int64_t largest_index(const float* values, const std::vector<uint8_t>& taken) {
  int64_t best = -1;
  for (int64_t i = 0; i < static_cast<int64_t>(taken.size()); ++i) {
    if (taken[static_cast<size_t>(i)] != 0) continue;
    if (best < 0 || values[i] > values[best]) best = i;
  }
  return best;
}

float sum_of_two_largest(const float* values, int64_t count) {
  std::vector<uint8_t> taken(static_cast<size_t>(count));
  const int64_t first = largest_index(values, taken);
  if (count == 1) return values[first];
  taken[static_cast<size_t>(first)] = 1;
  return values[first] + values[largest_index(values, taken)];
}

// Takes every expert outside the best groups, so that none of them can be chosen.
void take_weak_groups(const float* biased, const RouterParams& params, std::vector<uint8_t>& taken) {
  const int64_t group_size = static_cast<int64_t>(taken.size()) / params.num_groups;
  std::vector<float> scores(static_cast<size_t>(params.num_groups));
  for (int64_t g = 0; g < params.num_groups; ++g) {
    scores[static_cast<size_t>(g)] = sum_of_two_largest(biased + g * group_size, group_size);
  }
  std::vector<uint8_t> kept(static_cast<size_t>(params.num_groups));
  for (int64_t i = 0; i < params.top_groups; ++i) kept[static_cast<size_t>(largest_index(scores.data(), kept))] = 1;
  for (size_t i = 0; i < taken.size(); ++i) taken[i] = kept[i / static_cast<size_t>(group_size)] == 0 ? 1 : 0;
}

}  // namespace

void choose_experts(const float* biased, int64_t experts, const RouterParams& params, int32_t* chosen) {
  std::vector<uint8_t> taken(static_cast<size_t>(experts));
  if (params.num_groups > 1) take_weak_groups(biased, params, taken);
  for (int64_t j = 0; j < params.top_k; ++j) {
    const int64_t best = largest_index(biased, taken);
    taken[static_cast<size_t>(best)] = 1;
    chosen[j] = static_cast<int32_t>(best);
  }
}

void sort_slots(const Tensor& ids, int64_t experts, const Tensor& order, const Tensor& offsets) {
  std::vector<int32_t> next(static_cast<size_t>(experts) + 1);
  for (int64_t t = 0; t < ids.rows; ++t) {
    for (int64_t j = 0; j < ids.cols; ++j) {
      const int64_t expert = row_of<int32_t>(ids, t)[j];
      if (expert == -1) continue;
      check_index("expert id", expert, experts);
      ++next[static_cast<size_t>(expert) + 1];
    }
  }
  for (size_t e = 0; e < static_cast<size_t>(experts); ++e) next[e + 1] += next[e];
  for (int64_t e = 0; e <= experts; ++e) *row_of<int32_t>(offsets, e) = next[static_cast<size_t>(e)];
  for (int64_t t = 0; t < ids.rows; ++t) {
    for (int64_t j = 0; j < ids.cols; ++j) {
      const int32_t expert = row_of<int32_t>(ids, t)[j];
      if (expert == -1) continue;
      *row_of<int32_t>(order, next[static_cast<size_t>(expert)]++) = static_cast<int32_t>(t * ids.cols + j);
    }
  }
}

}  // namespace tandem::kernels
