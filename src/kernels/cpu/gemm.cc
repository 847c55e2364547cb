#include "src/kernels/cpu/gemm.h"

#include <algorithm>
#include <array>

#include "src/kernels/shapes.h"

namespace tandem::kernels::cpu {

RowShape row_shape(const WeightFormat& format, int64_t k) {
  return {format, k, format.is_integer() ? row_layout(format, k) : IntegerLayout{}};
}

RowShape row_shape(const PackedWeight& weight) { return {weight.format(), weight.k(), weight.integers()}; }

int64_t row_bytes_of(const Isa& isa, const RowShape& shape) {
  if (shape.format.is_integer()) return shape.integers.row_bytes();
  if (isa.narrow_rows && shape.format == kBf16Weights) return round_up(shape.k, 2) * int64_t{sizeof(uint16_t)};
  return 0;
}

void convert_row(const Isa& isa, const RowShape& shape, const float* x, std::byte* out) {
  if (shape.format.is_integer()) return isa.to_integers(x, shape.integers, out);
  uint16_t* narrow = reinterpret_cast<uint16_t*>(out);
  isa.to_bf16(x, shape.k, narrow);
  if (shape.k % 2 != 0) narrow[shape.k] = 0;
}

GemmInput prepare_input(const Isa& isa, ThreadPool& pool, const PackedWeight& weight, const Tensor& x, int64_t parts,
                        int64_t part_stride, Scratch& scratch) {
  const RowShape shape = row_shape(weight);
  const int64_t part_bytes = row_bytes_of(isa, shape);
  if (part_bytes == 0) {
    return GemmInput{x.address, x.stride * int64_t{sizeof(float)}, part_stride * int64_t{sizeof(float)}};
  }
  const int64_t total = x.rows * parts;
  std::byte* rows = scratch.get<std::byte>(total * part_bytes);
  const auto convert = [&](int64_t index) {
    convert_row(isa, shape, row_of<const float>(x, index / parts) + (index % parts) * part_stride,
                rows + index * part_bytes);
  };
  constexpr int64_t kElementsPerTask = 32 * 1024;
  const int64_t per_task = std::max(int64_t{1}, kElementsPerTask / weight.k());
  pool.run((total + per_task - 1) / per_task, [&](int64_t task, int /*worker*/) {
    for (int64_t i = task * per_task; i < std::min(total, (task + 1) * per_task); ++i) convert(i);
  });
  return GemmInput{rows, parts * part_bytes, part_bytes};
}

std::vector<GemmTask> plan_tasks(std::span<const GemmRows> items, int64_t panels, int64_t max_panels, int threads) {
  constexpr int64_t kTasksPerThread = 8;  // so that threads of unequal speed end together
  constexpr int64_t kFewTasks = 4;   // of one block of rows: it is bound by memory, and every task starts anew there
  constexpr int64_t kMinPanels = 4;  // what the narrowest tile takes at once with AVX2
  int64_t row_blocks = 0;
  for (const GemmRows& item : items) row_blocks += (item.rows + kMaxGemmRows - 1) / kMaxGemmRows;
  std::vector<GemmTask> tasks;
  if (row_blocks == 0) return tasks;
  const int64_t groups = std::max(int64_t{1}, threads * (row_blocks == 1 ? kFewTasks : kTasksPerThread) / row_blocks);
  const int64_t wanted = round_up((panels + groups - 1) / groups, kMinPanels);
  const int64_t step = std::min(wanted, max_panels);
  for (const GemmRows& item : items) {
    const int64_t blocks = (item.rows + kMaxGemmRows - 1) / kMaxGemmRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * item.rows / blocks;
      const int64_t rows = (b + 1) * item.rows / blocks - row;
      for (int64_t p = 0; p < panels; p += step) {
        tasks.push_back(GemmTask{0, item.matrix, item.first_row + row, rows, p, std::min(step, panels - p)});
      }
    }
  }
  return tasks;
}

void multiply_columns(const Isa& isa, const PackedWeight& weight, int64_t matrix, int64_t first_column, int64_t cols,
                      const void* const* x, int64_t rows, float* const* out, float* scratch) {
  GemmBlock block;
  block.x = x;
  block.rows = rows;
  block.panels = weight.panel(matrix, first_column / kPanelWidth);
  block.panel_bytes = weight.panel_bytes();
  block.k = weight.k();
  block.cols = cols;
  block.out = out;
  block.scratch = scratch;
  const WeightFormat& format = weight.format();
  if (format == kF32Weights) return isa.gemm_f32(block);
  if (format == kBf16Weights) return isa.gemm_bf16(block);
  if (format.type == WeightType::kBf16) return isa.gemm_bf16_wide_input(block);
  block.integers = &weight.integers();
  if (format.type == WeightType::kInt8) {
    return format.activation_bits == 8 ? isa.gemm_int8_a8(block) : isa.gemm_int8_a16(block);
  }
  return format.activation_bits == 8 ? isa.gemm_int4_a8(block) : isa.gemm_int4_a16(block);
}

void multiply_all(const Isa& isa, ThreadPool& pool, std::span<const GemmProduct> products, const GemmInput& x,
                  int64_t out_part_stride, Scratch& workers) {
  std::vector<GemmTask> tasks;
  for (size_t p = 0; p < products.size(); ++p) {
    const PackedWeight& weight = *products[p].weight;
    std::vector<GemmRows> items;
    for (int64_t matrix = 0; matrix < weight.batch(); ++matrix) {
      items.push_back(GemmRows{matrix, 0, products[p].out.rows});
    }
    for (GemmTask& task : plan_tasks(items, weight.panels(), weight.panels(), pool.num_threads())) {
      task.product = static_cast<int64_t>(p);
      tasks.push_back(task);
    }
  }
  float* scratch = workers.get<float>(pool.num_threads() * kGemmScratch);
  run_tasks(pool, tasks, products[0].weight->k(), [&](const GemmTask& task, int worker) {
    const auto& [weight, out] = products[static_cast<size_t>(task.product)];
    std::array<const void*, kMaxGemmRows> x_rows;
    std::array<float*, kMaxGemmRows> out_rows;
    const int64_t first_column = task.first_panel * kPanelWidth;
    for (int64_t r = 0; r < task.rows; ++r) {
      const size_t i = static_cast<size_t>(r);
      x_rows[i] = x.row(task.first_row + r, task.matrix);
      out_rows[i] = row_of<float>(out, task.first_row + r) + task.matrix * out_part_stride + first_column;
    }
    const int64_t cols = std::min(task.panels * kPanelWidth, weight->n() - first_column);
    multiply_columns(isa, *weight, task.matrix, first_column, cols, x_rows.data(), task.rows, out_rows.data(),
                     scratch + worker * kGemmScratch);
  });
}

}  // namespace tandem::kernels::cpu
