// Scalar parts of expert routing that every backend on the host shares: they compare and copy, so they cannot round.
#pragma once

#include <cstdint>

#include "src/kernels/ops.h"

namespace tandem::kernels {

// Chooses params.top_k of `experts` by their biased scores, as RouterParams says. Writes their indices by descending
// score, ties to the lowest index.
void choose_experts(const float* biased, int64_t experts, const RouterParams& params, int32_t* chosen);

// Ops::sort_by_expert for host memory: a stable counting sort.
void sort_slots(const Tensor& ids, int64_t experts, const Tensor& order, const Tensor& offsets);

}  // namespace tandem::kernels
