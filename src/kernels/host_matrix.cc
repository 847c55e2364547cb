#include "src/kernels/host_matrix.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "src/base/check.h"
#include "src/kernels/convert.h"

namespace tandem::kernels {
namespace {

template <typename T>
T load(const std::byte* address) {
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

float load_float(const std::byte* address, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return load<float>(address);
    case DType::kBf16:
      return float_from_bf16(load<uint16_t>(address));
    case DType::kF16:
      return float_from_f16(load<uint16_t>(address));
    default:
      break;
  }
  fail_check(__FILE__, __LINE__, fmt::format("dtype {} holds no scale", dtype_name(dtype)));
}

const std::byte* element_address(const HostMatrix& matrix, int64_t n, int64_t k) {
  const int64_t stride = matrix.row_stride == 0 ? matrix.k : matrix.row_stride;
  return matrix.data + (n * stride + k) * dtype_bytes(matrix.dtype);
}

void decode_fp8_row(const HostMatrix& matrix, int64_t n, int64_t first, int64_t count, float* out) {
  const std::array<float, 256>& table = f8e4m3_table();
  const std::byte* codes = element_address(matrix, n, first);
  const int64_t blocks_per_row = (matrix.k + matrix.block_k - 1) / matrix.block_k;
  const int64_t scale_row = (n / matrix.block_n) * blocks_per_row;
  for (int64_t i = 0; i < count;) {
    const int64_t block = (first + i) / matrix.block_k;
    const int64_t end = std::min(count, (block + 1) * matrix.block_k - first);
    const int64_t scale_offset = (scale_row + block) * dtype_bytes(matrix.scales_dtype);
    const float scale = load_float(matrix.scales + scale_offset, matrix.scales_dtype);
    for (; i < end; ++i) out[i] = table[std::to_integer<size_t>(codes[i])] * scale;
  }
}

}  // namespace

void check_host_matrices(std::span<const HostMatrix> matrices) {
  CHECK_GT(matrices.size(), 0U);
  for (const HostMatrix& matrix : matrices) {
    CHECK_GT(matrix.n, 0);
    CHECK_GT(matrix.k, 0);
    CHECK_EQ(matrix.n, matrices[0].n);
    CHECK_EQ(matrix.k, matrices[0].k);
    CHECK(matrix.data != nullptr);
    CHECK(matrix.row_stride == 0 || matrix.row_stride >= matrix.k);
    const bool is_fp8 = matrix.dtype == DType::kF8E4M3;
    CHECK(is_fp8 || matrix.dtype == DType::kF32 || matrix.dtype == DType::kBf16 || matrix.dtype == DType::kF16);
    CHECK_EQ(is_fp8, matrix.scales != nullptr);
    if (is_fp8) {
      CHECK_GT(matrix.block_n, 0);
      CHECK_GT(matrix.block_k, 0);
      CHECK(matrix.scales_dtype == DType::kF32 || matrix.scales_dtype == DType::kBf16 ||
            matrix.scales_dtype == DType::kF16);
    }
  }
}

void decode_row(const HostMatrix& matrix, int64_t n, int64_t first, int64_t count, float* out) {
  const std::byte* source = element_address(matrix, n, first);
  switch (matrix.dtype) {
    case DType::kF32:
      std::memcpy(out, source, static_cast<size_t>(count) * sizeof(float));
      return;
    case DType::kBf16:
      for (int64_t i = 0; i < count; ++i) out[i] = float_from_bf16(load<uint16_t>(source + 2 * i));
      return;
    case DType::kF16:
      for (int64_t i = 0; i < count; ++i) out[i] = float_from_f16(load<uint16_t>(source + 2 * i));
      return;
    case DType::kF8E4M3:
      decode_fp8_row(matrix, n, first, count, out);
      return;
    default:
      break;
  }
  fail_check(__FILE__, __LINE__, fmt::format("dtype {} is no weight format", dtype_name(matrix.dtype)));
}

void decode_row_bf16(const HostMatrix& matrix, int64_t n, int64_t first, int64_t count, uint16_t* out) {
  if (matrix.dtype == DType::kBf16) {
    std::memcpy(out, element_address(matrix, n, first), static_cast<size_t>(count) * sizeof(uint16_t));
    return;
  }
  constexpr int64_t kChunk = 256;
  std::array<float, kChunk> values;
  for (int64_t done = 0; done < count; done += kChunk) {
    const int64_t chunk = std::min(kChunk, count - done);
    decode_row(matrix, n, first + done, chunk, values.data());
    for (int64_t i = 0; i < chunk; ++i) out[done + i] = bf16_from_float(values[static_cast<size_t>(i)]);
  }
}

}  // namespace tandem::kernels
