// The router, and the experts' grouped matrix products.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "src/kernels/cpu/cpu_ops.h"
#include "src/kernels/expert_rows.h"
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
  float* f32 = nullptr;  // [places, width]
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

// The rows of x that some place in `order` uses.
struct UsedRows {
  std::vector<int32_t> row_of_place;
  std::vector<int32_t> rows;           // each once, by its first place
  std::vector<int32_t> index_of_place;  // into `rows`
  int64_t count() const { return std::ssize(rows); }

  // Where the input of each place lies: in an array of all rows, or of the used ones.
  std::vector<const void*> pointers(const std::byte* base, int64_t row_bytes) const {
    return pointers_by(row_of_place, base, row_bytes);
  }
  std::vector<const void*> compact_pointers(const std::byte* base, int64_t row_bytes) const {
    return pointers_by(index_of_place, base, row_bytes);
  }

 private:
  static std::vector<const void*> pointers_by(const std::vector<int32_t>& indices, const std::byte* base,
                                              int64_t row_bytes) {
    std::vector<const void*> result;
    result.reserve(indices.size());
    for (const int32_t index : indices) result.push_back(base + index * row_bytes);
    return result;
  }
};

UsedRows used_rows(const Tensor& order, const Tensor& offsets, int64_t experts, int64_t top_k, int64_t num_rows) {
  UsedRows used;
  const int64_t places = element_of<int32_t>(offsets, experts);
  std::vector<int32_t> index_of_row(static_cast<size_t>(num_rows), -1);
  for (int64_t place = 0; place < places; ++place) {
    const int64_t slot = element_of<int32_t>(order, place);
    check_index("slot", slot, num_rows * top_k);
    const int32_t row = static_cast<int32_t>(slot / top_k);
    int32_t& index = index_of_row[static_cast<size_t>(row)];
    if (index < 0) {
      index = static_cast<int32_t>(used.rows.size());
      used.rows.push_back(row);
    }
    used.row_of_place.push_back(row);
    used.index_of_place.push_back(index);
  }
  return used;
}

// `shape` only with kExact.
void encode_row(const Isa& isa, RowFormat format, const RowShape& shape, const float* x, int64_t k, std::byte* out) {
  switch (format) {
    case RowFormat::kExact:
      if (row_bytes_of(isa, shape) > 0) return convert_row(isa, shape, x, out);
      std::memcpy(out, x, static_cast<size_t>(k) * sizeof(float));
      return;
    case RowFormat::kBf16: return isa.to_bf16(x, k, reinterpret_cast<uint16_t*>(out));
    case RowFormat::kInt8: return isa.to_integers(x, row_layout(kInt8Rows, k), out);
    case RowFormat::kF8E4M3: {
      const float scale = isa.quantize_f8(x, k, reinterpret_cast<uint8_t*>(out));
      std::memcpy(out + row_scale_offset(format, k), &scale, sizeof(scale));
      return;
    }
  }
}

// Not for kExact.
void decode_row(const Isa& isa, RowFormat format, const std::byte* row, int64_t k, float* out) {
  if (format == RowFormat::kBf16) return isa.from_bf16(reinterpret_cast<const uint16_t*>(row), k, out);
  if (format == RowFormat::kInt8) return decode_int8_row(row, k, out);
  float scale = 0.0F;
  std::memcpy(&scale, row + row_scale_offset(format, k), sizeof(scale));
  isa.from_f8(reinterpret_cast<const uint8_t*>(row), k, scale, out);
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
  CpuStream& own = static_cast<CpuStream&>(stream);
  const UsedRows used = used_rows(order, offsets, gate_up.batch(), top_k, x.rows);
  const RowShape shape = row_shape(packed_weight(gate_up));
  const int64_t row_bytes = row_bytes_of(isa_, shape);
  ExpertPlaces places;
  if (row_bytes == 0) {
    places.inputs = used.pointers(x.address, x.stride * int64_t{sizeof(float)});
  } else {
    std::byte* rows = own.narrow.get<std::byte>(used.count() * row_bytes);
    for_each_row(used.count(), shape.k, [&](int64_t i) {
      convert_row(isa_, shape, row_of<const float>(x, used.rows[static_cast<size_t>(i)]), rows + i * row_bytes);
    });
    places.inputs = used.compact_pointers(rows, row_bytes);
  }
  for (size_t p = 0; p < places.inputs.size(); ++p) {
    places.outputs.push_back(row_of<float>(out, element_of<int32_t>(order, static_cast<int64_t>(p))));
  }
  multiply_experts(own, places, offsets, gate_up, down);
}

void CpuOps::expert_mlp_encoded(Stream& stream, const EncodedRows& x, const Tensor& order, const Tensor& offsets,
                                int64_t top_k, const Weight& gate_up, const Weight& down, float* out,
                                const Tensor& targets) {
  const int64_t encoded_bytes = expert_row_bytes(x.format, gate_up.format(), gate_up.k());
  check_expert_mlp_encoded(x.rows, encoded_bytes, order, offsets, top_k, gate_up, down, out, targets);
  CpuStream& own = static_cast<CpuStream&>(stream);
  const UsedRows used = used_rows(order, offsets, gate_up.batch(), top_k, x.rows.rows);
  ExpertPlaces places;
  if (x.format == RowFormat::kExact) {
    places.inputs = used.pointers(x.rows.address, x.rows.stride);
  } else {
    const RowShape shape = row_shape(packed_weight(gate_up));
    const int64_t narrow_bytes = row_bytes_of(isa_, shape);
    const int64_t row_bytes = narrow_bytes == 0 ? shape.k * int64_t{sizeof(float)} : narrow_bytes;
    std::byte* rows = own.narrow.get<std::byte>(used.count() * row_bytes);
    float* decoded = own.rows.get<float>(used.count() * shape.k);
    for_each_row(used.count(), shape.k, [&](int64_t i) {
      const std::byte* row = row_of<const std::byte>(x.rows, used.rows[static_cast<size_t>(i)]);
      float* wide = narrow_bytes == 0 ? reinterpret_cast<float*>(rows + i * row_bytes) : decoded + i * shape.k;
      decode_row(isa_, x.format, row, shape.k, wide);
      if (narrow_bytes > 0) convert_row(isa_, shape, wide, rows + i * row_bytes);
    });
    places.inputs = used.compact_pointers(rows, row_bytes);
  }
  for (size_t p = 0; p < places.inputs.size(); ++p) {
    places.outputs.push_back(out + element_of<int64_t>(targets, static_cast<int64_t>(p)));
  }
  multiply_experts(own, places, offsets, gate_up, down);
}

int64_t CpuOps::expert_row_bytes(RowFormat format, const WeightFormat& weights, int64_t k) const {
  if (format != RowFormat::kExact) return rounded_row_bytes(format, k);
  const int64_t bytes = row_bytes_of(isa_, row_shape(weights, k));
  return round_up_row(bytes == 0 ? k * int64_t{sizeof(float)} : bytes);
}

void CpuOps::encode_expert_rows(Stream& /*stream*/, const Tensor& x, const WeightFormat& weights,
                                const EncodedRows& out) {
  check_encode_expert_rows(x, out.rows, expert_row_bytes(out.format, weights, x.cols));
  const RowShape shape = out.format == RowFormat::kExact ? row_shape(weights, x.cols) : RowShape{};
  for_each_row(x.rows, x.cols, [&](int64_t t) {
    encode_row(isa_, out.format, shape, row_of<const float>(x, t), x.cols, row_of<std::byte>(out.rows, t));
  });
}

// Both products of every place: down_e(silu(gate_e(input)) * up_e(input)).
void CpuOps::multiply_experts(CpuStream& own, const ExpertPlaces& places, const Tensor& offsets, const Weight& gate_up,
                              const Weight& down) {
  const std::vector<GemmRows> items = rows_of_experts(offsets, gate_up.batch());
  if (items.empty()) return;
  const PackedWeight& first = packed_weight(gate_up);
  const PackedWeight& second = packed_weight(down);
  const int64_t num_places = std::ssize(places.inputs);

  const Hidden hidden{own.rows.get<float>(num_places * second.k()), second.k()};
  float* scratch = own.workers.get<float>(num_threads() * kGateUpScratch);

  const int64_t hidden_panels = (hidden.width + kPanelWidth - 1) / kPanelWidth;
  const std::vector<GemmTask> gate_up_tasks = plan_tasks(items, hidden_panels, kMaxGatePanels, num_threads());
  run_tasks(pool_, gate_up_tasks, 2 * first.k(), [&](const GemmTask& task, int worker) {
    compute_hidden(isa_, first, task, places.inputs.data() + task.first_row, scratch + worker * kGateUpScratch, hidden);
  });

  // In a pass of its own: a row's scale needs the whole row.
  const Tensor hidden_rows{reinterpret_cast<std::byte*>(hidden.f32), DType::kF32, num_places, hidden.width,
                           hidden.width};
  const GemmInput hidden_input = prepare_input(isa_, pool_, second, hidden_rows, 1, 0, own.hidden);

  const std::vector<GemmTask> down_tasks = plan_tasks(items, second.panels(), second.panels(), num_threads());
  run_tasks(pool_, down_tasks, second.k(), [&](const GemmTask& task, int worker) {
    std::array<const void*, kMaxGemmRows> x_rows;
    std::array<float*, kMaxGemmRows> out_rows;
    const int64_t first_column = task.first_panel * kPanelWidth;
    for (int64_t r = 0; r < task.rows; ++r) {
      x_rows[static_cast<size_t>(r)] = hidden_input.row(task.first_row + r, 0);
      out_rows[static_cast<size_t>(r)] = places.outputs[static_cast<size_t>(task.first_row + r)] + first_column;
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
