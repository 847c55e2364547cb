#include "src/ep/window_plan.h"

#include <algorithm>

#include "src/base/check.h"
#include "src/ep/limits.h"

namespace tandem::ep {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kDefaultReceivedFactor = 2;  // of max_rows: as much skew as fits into one round

int64_t align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Of ranks other than the own one, or with a rank-major plan of each rank.
int64_t choose_received_rows(const ExchangeOptions& options, const WindowPlan& plan) {
  if (plan.num_ranks == 1) return 0;
  if (options.backend != All2All::kHighThroughput) return plan.max_rows;
  const int64_t most = plan.max_rows * (plan.num_ranks - 1);
  const int64_t wanted = options.received_rows > 0 ? options.received_rows : plan.max_rows * kDefaultReceivedFactor;
  return std::min(most, wanted);
}

}  // namespace

WindowPlan plan_window(const ExchangeOptions& options, const kernels::Ops& ops, const model::ExchangeShape& shape,
                       int32_t num_ranks) {
  CHECK_GE(num_ranks, 1);
  CHECK_GE(shape.max_rows, 1);
  CHECK_LE(shape.max_rows, kMaxRows);
  CHECK_GE(shape.top_k, 1);
  WindowPlan plan;
  plan.backend = options.backend;
  plan.num_ranks = num_ranks;
  plan.max_rows = shape.max_rows;
  plan.top_k = shape.top_k;
  plan.hidden = shape.hidden;
  for (const kernels::WeightFormat& format : shape.formats) {
    plan.row_bytes = std::max(plan.row_bytes, ops.expert_row_bytes(options.row_format, format, shape.hidden));
  }
  plan.record_bytes = align(plan.row_bytes + (1 + shape.top_k) * int64_t{sizeof(int32_t)});
  plan.received_rows = choose_received_rows(options, plan);
  plan.num_records = plan.is_rank_major() ? num_ranks * plan.max_rows : plan.max_rows + plan.received_rows;
  CHECK_LE(plan.num_records * plan.top_k, kMaxSlotNumber);
  const bool has_counts = plan.backend == All2All::kHighThroughput;
  plan.records = has_counts ? align(2 * int64_t{num_ranks} * num_ranks * int64_t{sizeof(int32_t)}) : 0;
  plan.outputs = align(plan.records + plan.num_records * plan.record_bytes);
  plan.bytes = align(plan.outputs + plan.max_rows * plan.top_k * plan.hidden * int64_t{sizeof(float)});
  return plan;
}

}  // namespace tandem::ep
