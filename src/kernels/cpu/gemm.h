// Splits matrix products among threads. A task is some rows times some panels; each output is computed by one task, and
// its bits do not depend on which (isa.h).
#pragma once

#include <array>
#include <span>
#include <vector>

#include "src/kernels/cpu/isa.h"
#include "src/kernels/cpu/packed_weight.h"
#include "src/kernels/cpu/scratch.h"
#include "src/kernels/cpu/thread_pool.h"
#include "src/kernels/tensor.h"

namespace tandem::kernels::cpu {

// Rows of activations as a matrix product takes them: f32, bf16 padded to an even length, or integers. A row has
// one part per matrix of the weight (heads), `part_bytes` apart.
struct GemmInput {
  const std::byte* address = nullptr;
  int64_t row_bytes = 0;
  int64_t part_bytes = 0;
  const void* row(int64_t index, int64_t part) const { return address + index * row_bytes + part * part_bytes; }
};

// How products with weights of one format and k take rows.
struct RowShape {
  WeightFormat format;
  int64_t k = 0;
  IntegerLayout integers;  // for integer formats
};
RowShape row_shape(const WeightFormat& format, int64_t k);
RowShape row_shape(const PackedWeight& weight);

// Bytes of one such row, 0 where the product takes f32 as it is.
int64_t row_bytes_of(const Isa& isa, const RowShape& shape);
// Writes x [k] as the product takes it; not where that is f32.
void convert_row(const Isa& isa, const RowShape& shape, const float* x, std::byte* out);

// x [rows, …] whose part p begins at column p * part_stride; rounded into `scratch` where the product wants it so.
GemmInput prepare_input(const Isa& isa, ThreadPool& pool, const PackedWeight& weight, const Tensor& x, int64_t parts,
                        int64_t part_stride, Scratch& scratch);

// Some rows times some panels of one matrix. Rows and panels are in the caller's numbering.
struct GemmTask {
  int64_t product = 0;  // of several that share their rows
  int64_t matrix = 0;
  int64_t first_row = 0;
  int64_t rows = 0;  // <= kMaxGemmRows
  int64_t first_panel = 0;
  int64_t panels = 0;
};

// `rows` rows times all panels of one matrix.
struct GemmRows {
  int64_t matrix = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
};

// Cuts every item times `panels` panels into tasks of at most `max_panels`, several for every thread.
std::vector<GemmTask> plan_tasks(std::span<const GemmRows> items, int64_t panels, int64_t max_panels, int threads);

// Runs body(task, worker) for each task, on the calling thread alone if they are little work together.
template <typename Body>
void run_tasks(ThreadPool& pool, std::span<const GemmTask> tasks, int64_t k, const Body& body) {
  constexpr int64_t kInlineProducts = 128 * 1024;  // multiply-adds, about 10 µs: waking a thread costs as much
  int64_t products = 0;
  for (const GemmTask& task : tasks) products += task.rows * task.panels * kPanelWidth * k;
  if (products <= kInlineProducts) {
    for (const GemmTask& task : tasks) body(task, 0);
    return;
  }
  pool.run(static_cast<int64_t>(tasks.size()),
           [&](int64_t index, int worker) { body(tasks[static_cast<size_t>(index)], worker); });
}

// Outputs [first_column, first_column + cols) of one matrix, of which first_column is a multiple of kPanelWidth. x and
// out hold `rows` pointers, out's to first_column; scratch holds kGemmScratch floats.
void multiply_columns(const Isa& isa, const PackedWeight& weight, int64_t matrix, int64_t first_column, int64_t cols,
                      const void* const* x, int64_t rows, float* const* out, float* scratch);

struct GemmProduct {
  const PackedWeight* weight = nullptr;
  Tensor out;
};

// Every row of x times every matrix of the weights, which have the same format, batch and k; matrix m writes from
// column m * out_part_stride of its `out` on.
void multiply_all(const Isa& isa, ThreadPool& pool, std::span<const GemmProduct> products, const GemmInput& x,
                  int64_t out_part_stride, Scratch& workers);

}  // namespace tandem::kernels::cpu
