// The router, and the experts' grouped matrix products.
#include <algorithm>
#include <array>
#include <vector>

#include "src/kernels/cpu/cpu_ops.h"
#include "src/kernels/routing.h"
#include "src/kernels/shapes.h"

namespace tandem::kernels::cpu {
namespace {

// Panels of gate (and as many of up) per task: their sums for kMaxGemmRows rows are 200 KiB, which L2 holds.
constexpr int64_t kMaxGatePanels = 16;
// One panel more for up, whose first column may lie inside a panel.
constexpr int64_t kGateUpColumns = (2 * kMaxGatePanels + 1) * kPanelWidth;
constexpr int64_t kGateUpScratch = kGemmScratch + kMaxGemmRows * kGateUpColumns;

// The hidden activations between the two products, by place in `order`.
struct Hidden {
  float* f32 = nullptr;  // [slots, width]
  int64_t width = 0;
};

std::vector<GemmRows> rows_of_experts(const Tensor& offsets, int64_t experts) {
  std::vector<GemmRows> items;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t begin = element_of<int32_t>(offsets, expert);
    const int64_t end = element_of<int32_t>(offsets, expert + 1);
    if (end > begin) items.push_back(GemmRows{expert, begin, end - begin});
  }
  return items;
}

// Columns of the hidden activations that `task` computes, for its rows: gate and up products, then silu(gate) * up.
void compute_hidden(const Isa& isa, const PackedWeight& gate_up, const GemmTask& task, const void* const* x,
                    float* scratch, const Hidden& hidden) {
  const int64_t first = task.first_panel * kPanelWidth;
  const int64_t cols = std::min(task.panels * kPanelWidth, hidden.width - first);
  const int64_t up_first = (hidden.width + first) / kPanelWidth * kPanelWidth;
  const int64_t up_skip = hidden.width + first - up_first;
  float* gate = scratch + kGemmScratch;
  std::array<float*, kMaxGemmRows> gate_rows;
  std::array<float*, kMaxGemmRows> up_rows;
  for (size_t r = 0; r < static_cast<size_t>(task.rows); ++r) {
    gate_rows[r] = gate + static_cast<int64_t>(r) * kGateUpColumns;
    up_rows[r] = gate_rows[r] + kMaxGatePanels * kPanelWidth;
  }
  multiply_columns(isa, gate_up, task.matrix, first, cols, x, task.rows, gate_rows.data(), scratch);
  multiply_columns(isa, gate_up, task.matrix, up_first, up_skip + cols, x, task.rows, up_rows.data(), scratch);
  for (int64_t r = 0; r < task.rows; ++r) {
    const size_t i = static_cast<size_t>(r);
    float* out = hidden.f32 + (task.first_row + r) * hidden.width + first;
    isa.silu_mul(gate_rows[i], up_rows[i] + up_skip, cols, out);
  }
}

}  // namespace

void CpuOps::route(Stream& /*stream*/, const Tensor& logits, const Tensor& bias, const RouterParams& params,
                   const Tensor& ids, const Tensor& weights) {
  check_route(logits, bias, params, ids, weights);
  const size_t experts = static_cast<size_t>(logits.cols);
  for_each_row(logits.rows, 16 * logits.cols, [&](int64_t t) {
    std::vector<float> scores(experts);
    if (params.scoring == RouterScoring::kSigmoid) {
      isa_.sigmoid(row_of<float>(logits, t), logits.cols, scores.data());
    } else {
      isa_.softmax(row_of<float>(logits, t), logits.cols, scores.data());
    }
    std::vector<float> biased = scores;
    if (bias.address != nullptr) isa_.add(biased.data(), row_of<float>(bias, 0), logits.cols);
    int32_t* chosen = row_of<int32_t>(ids, t);
    choose_experts(biased.data(), logits.cols, params, chosen);

    float divisor = params.scoring == RouterScoring::kSigmoid ? 1e-20F : 0.0F;
    for (int64_t j = 0; j < params.top_k; ++j) divisor += scores[static_cast<size_t>(chosen[j])];
    if (!params.normalize) divisor = 1.0F;
    for (int64_t j = 0; j < params.top_k; ++j) {
      row_of<float>(weights, t)[j] = scores[static_cast<size_t>(chosen[j])] / divisor * params.scale;
    }
  });
}

void CpuOps::sort_by_expert(Stream& /*stream*/, const Tensor& ids, int64_t experts, const Tensor& order,
                            const Tensor& offsets) {
  check_sort_by_expert(ids, experts, order, offsets);
  sort_slots(ids, experts, order, offsets);
}

void CpuOps::expert_mlp(Stream& stream, const Tensor& x, const Tensor& order, const Tensor& offsets, int64_t top_k,
                        const Weight& gate_up, const Weight& down, const Tensor& out) {
  check_expert_mlp(x, order, offsets, top_k, gate_up, down, out);
  const std::vector<GemmRows> items = rows_of_experts(offsets, gate_up.batch());
  if (items.empty()) return;
  CpuStream& own = static_cast<CpuStream&>(stream);
  const PackedWeight& first = packed_weight(gate_up);
  const PackedWeight& second = packed_weight(down);
  const int64_t slots = out.rows;
  const auto slot_at = [&](int64_t place) {
    const int64_t slot = element_of<int32_t>(order, place);
    check_index("slot", slot, slots);
    return slot;
  };

  const Hidden hidden{own.rows.get<float>(slots * second.k()), second.k()};
  const GemmInput input = prepare_input(isa_, pool_, first, x, 1, 0, own.narrow);
  float* scratch = own.workers.get<float>(num_threads() * kGateUpScratch);

  const int64_t hidden_panels = (hidden.width + kPanelWidth - 1) / kPanelWidth;
  const std::vector<GemmTask> gate_up_tasks = plan_tasks(items, hidden_panels, kMaxGatePanels, num_threads());
  run_tasks(pool_, gate_up_tasks, 2 * first.k(), [&](const GemmTask& task, int worker) {
    std::array<const void*, kMaxGemmRows> x_rows;
    for (int64_t r = 0; r < task.rows; ++r) {
      x_rows[static_cast<size_t>(r)] = input.row(slot_at(task.first_row + r) / top_k, 0);
    }
    compute_hidden(isa_, first, task, x_rows.data(), scratch + worker * kGateUpScratch, hidden);
  });

  // In a pass of its own: a row's scale needs the whole row.
  const Tensor hidden_rows{reinterpret_cast<std::byte*>(hidden.f32), DType::kF32, slots, hidden.width, hidden.width};
  const GemmInput hidden_input = prepare_input(isa_, pool_, second, hidden_rows, 1, 0, own.hidden);

  const std::vector<GemmTask> down_tasks = plan_tasks(items, second.panels(), second.panels(), num_threads());
  run_tasks(pool_, down_tasks, second.k(), [&](const GemmTask& task, int worker) {
    std::array<const void*, kMaxGemmRows> x_rows;
    std::array<float*, kMaxGemmRows> out_rows;
    const int64_t first_column = task.first_panel * kPanelWidth;
    for (int64_t r = 0; r < task.rows; ++r) {
      x_rows[static_cast<size_t>(r)] = hidden_input.row(task.first_row + r, 0);
      out_rows[static_cast<size_t>(r)] = row_of<float>(out, slot_at(task.first_row + r)) + first_column;
    }
    const int64_t cols = std::min(task.panels * kPanelWidth, second.n() - first_column);
    multiply_columns(isa_, second, task.matrix, first_column, cols, x_rows.data(), task.rows, out_rows.data(),
                     scratch + worker * kGateUpScratch);
  });
}

void CpuOps::combine(Stream& /*stream*/, const Tensor& expert_out, const Tensor& weights, const Tensor& out) {
  check_combine(expert_out, weights, out);
  for_each_row(out.rows, weights.cols * out.cols, [&](int64_t t) {
    isa_.weighted_sum(row_of<float>(expert_out, t * weights.cols), expert_out.stride, row_of<float>(weights, t),
                      weights.cols, out.cols, row_of<float>(out, t));
  });
}

}  // namespace tandem::kernels::cpu
