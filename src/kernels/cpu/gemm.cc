#include "src/kernels/cpu/gemm.h"

#include <algorithm>
#include <array>

#include "src/kernels/shapes.h"

namespace tandem::kernels::cpu {

bool takes_narrow_rows(const Isa& isa, const PackedWeight& weight) {
  return isa.narrow_rows && weight.format() == kBf16Weights;
}

GemmInput prepare_input(const Isa& isa, ThreadPool& pool, const PackedWeight& weight, const Tensor& x, int64_t parts,
                        int64_t part_stride, Scratch& scratch) {
  if (!takes_narrow_rows(isa, weight)) {
    return GemmInput{x.address, x.stride * int64_t{sizeof(float)}, part_stride * int64_t{sizeof(float)}};
  }
  const int64_t k = weight.k();
  const int64_t padded = round_up(k, 2);
  uint16_t* narrow = scratch.get<uint16_t>(x.rows * parts * padded);
  const auto round_part = [&](int64_t index) {
    uint16_t* out = narrow + index * padded;
    isa.to_bf16(row_of<const float>(x, index / parts) + (index % parts) * part_stride, k, out);
    if (padded > k) out[k] = 0;
  };
  constexpr int64_t kElementsPerTask = 32 * 1024;
  const int64_t total = x.rows * parts;
  const int64_t per_task = std::max(int64_t{1}, kElementsPerTask / padded);
  pool.run((total + per_task - 1) / per_task, [&](int64_t task, int /*worker*/) {
    for (int64_t i = task * per_task; i < std::min(total, (task + 1) * per_task); ++i) round_part(i);
  });
  const int64_t part_bytes = padded * int64_t{sizeof(uint16_t)};
  return GemmInput{reinterpret_cast<const std::byte*>(narrow), parts * part_bytes, part_bytes};
}

std::vector<GemmTask> plan_tasks(std::span<const GemmRows> items, int64_t panels, int64_t max_panels, int threads) {
  constexpr int64_t kTasksPerThread = 8;  // so that threads of unequal speed end together
  constexpr int64_t kMinPanels = 4;       // what the narrowest tile takes at once with AVX2
  int64_t row_blocks = 0;
  for (const GemmRows& item : items) row_blocks += (item.rows + kMaxGemmRows - 1) / kMaxGemmRows;
  std::vector<GemmTask> tasks;
  if (row_blocks == 0) return tasks;
  const int64_t groups = std::max(int64_t{1}, threads * kTasksPerThread / row_blocks);
  const int64_t wanted = round_up((panels + groups - 1) / groups, kMinPanels);
  const int64_t step = std::min(wanted, max_panels);
  for (const GemmRows& item : items) {
    const int64_t blocks = (item.rows + kMaxGemmRows - 1) / kMaxGemmRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * item.rows / blocks;
      const int64_t rows = (b + 1) * item.rows / blocks - row;
      for (int64_t p = 0; p < panels; p += step) {
        tasks.push_back(GemmTask{item.matrix, item.first_row + row, rows, p, std::min(step, panels - p)});
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
  if (weight.format() == kF32Weights) {
    isa.gemm_f32(block);
  } else {
    isa.gemm_bf16(block);
  }
}

void multiply_all(const Isa& isa, ThreadPool& pool, const PackedWeight& weight, const GemmInput& x, const Tensor& out,
                  int64_t out_part_stride, Scratch& workers) {
  std::vector<GemmRows> items;
  for (int64_t matrix = 0; matrix < weight.batch(); ++matrix) items.push_back(GemmRows{matrix, 0, out.rows});
  const std::vector<GemmTask> tasks = plan_tasks(items, weight.panels(), weight.panels(), pool.num_threads());
  float* scratch = workers.get<float>(pool.num_threads() * kGemmScratch);
  run_tasks(pool, tasks, weight.k(), [&](const GemmTask& task, int worker) {
    std::array<const void*, kMaxGemmRows> x_rows;
    std::array<float*, kMaxGemmRows> out_rows;
    const int64_t first_column = task.first_panel * kPanelWidth;
    for (int64_t r = 0; r < task.rows; ++r) {
      const size_t i = static_cast<size_t>(r);
      x_rows[i] = x.row(task.first_row + r, task.matrix);
      out_rows[i] = row_of<float>(out, task.first_row + r) + task.matrix * out_part_stride + first_column;
    }
    const int64_t cols = std::min(task.panels * kPanelWidth, weight.n() - first_column);
    multiply_columns(isa, weight, task.matrix, first_column, cols, x_rows.data(), task.rows, out_rows.data(),
                     scratch + worker * kGemmScratch);
  });
}

}  // namespace tandem::kernels::cpu
