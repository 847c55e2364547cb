// The kv_b projection of MLA in the two forms that use it.
#pragma once

#include <memory>
#include <vector>

#include "src/model/weights.h"

namespace tandem::model {

struct MlaKvBShape {
  int64_t heads = 0;
  int64_t heads_per_group = 0;
  int64_t nope_dim = 0;   // N
  int64_t value_dim = 0;  // V
};

// kv_b is [heads (N + V), L]; per head, rows 0 … N-1 are W_UK (latent to key), rows N … N+V-1 are W_UV (latent to
// value).
struct MlaKvB {
  std::vector<std::unique_ptr<kernels::Weight>> expand;  // rows of heads_per_group heads each; the last may have fewer
  std::unique_ptr<kernels::Weight> absorb_k;             // heads x [L, N]: W_UK transposed
  std::unique_ptr<kernels::Weight> absorb_v;             // heads x [V, L]: W_UV
};

// `kv_b` is dense, as WeightPlan::derived gives it.
MlaKvB pack_mla_kv_b(WeightPlan& plan, const kernels::HostMatrix& kv_b, const MlaKvBShape& shape);

}  // namespace tandem::model
