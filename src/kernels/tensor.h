// Device memory and 2-D views of it. Nothing outside src/kernels may dereference a device address:
// data goes in by Ops::upload and comes out by Ops::read_back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/base/check.h"

namespace tandem::kernels {

enum class DType : uint8_t { kF32, kBf16, kF16, kF8E4M3, kI8, kU8, kI32, kI64, kU4 };

// Of one element; not for kU4, of which a byte holds two.
constexpr int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32: return 4;
    case DType::kBf16:
    case DType::kF16: return 2;
    case DType::kF8E4M3:
    case DType::kI8:
    case DType::kU8: return 1;
    case DType::kU4: break;
    case DType::kI64: return 8;
  }
  return 0;
}
const char* dtype_name(DType dtype);  // "f32", "bf16", …

// A row-major matrix in device memory; `stride` is the distance between rows in elements (>= cols).
// A view does not own its memory. Higher ranks are folded into columns: [T, heads, d] is [T, heads * d].
struct Tensor {
  std::byte* address = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  int64_t bytes() const { return rows == 0 ? 0 : ((rows - 1) * stride + cols) * dtype_bytes(dtype); }

  // Rows [first, first + count).
  Tensor row_slice(int64_t first, int64_t count) const {
    CHECK_LE(first + count, rows);
    return Tensor{address + first * stride * dtype_bytes(dtype), dtype, count, cols, stride};
  }
  // Columns [first, first + count) of every row.
  Tensor col_slice(int64_t first, int64_t count) const {
    CHECK_LE(first + count, cols);
    return Tensor{address + first * dtype_bytes(dtype), dtype, rows, count, stride};
  }
};

}  // namespace tandem::kernels
