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

// Values of codes, without their scale.
void decode_codes(const HostMatrix& matrix, int64_t n, int64_t first, int64_t count, float* out) {
  if (matrix.dtype == DType::kU4) {
    const int64_t stride = ((matrix.row_stride == 0 ? matrix.k : matrix.row_stride) + 1) / 2;
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t pair = std::to_integer<uint8_t>(matrix.data[n * stride + (first + i) / 2]);
      out[i] = static_cast<float>((first + i) % 2 == 0 ? pair & 0x0FU : pair >> 4U);
    }
    return;
  }
  const std::byte* codes = element_address(matrix, n, first);
  if (matrix.dtype == DType::kI8) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<int8_t>(codes[i]));
    return;
  }
  const std::array<float, 256>& table = f8e4m3_table();
  for (int64_t i = 0; i < count; ++i) out[i] = table[std::to_integer<size_t>(codes[i])];
}

void decode_scaled_row(const HostMatrix& matrix, int64_t n, int64_t first, int64_t count, float* out) {
  decode_codes(matrix, n, first, count, out);
  const int64_t blocks_per_row = (matrix.k + matrix.block_k - 1) / matrix.block_k;
  const int64_t scale_row = (n / matrix.block_n) * blocks_per_row;
  for (int64_t i = 0; i < count;) {
    const int64_t block = (first + i) / matrix.block_k;
    const int64_t end = std::min(count, (block + 1) * matrix.block_k - first);
    const float scale = load_scale(matrix, scale_row + block);
    float zero = matrix.dtype == DType::kU4 ? 8.0F : 0.0F;
    if (matrix.zeros != nullptr) zero = static_cast<float>(std::to_integer<uint8_t>(matrix.zeros[scale_row + block]));
    for (; i < end; ++i) out[i] = (out[i] - zero) * scale;
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
    const bool has_scales =
        matrix.dtype == DType::kF8E4M3 || matrix.dtype == DType::kI8 || matrix.dtype == DType::kU4;
    CHECK(has_scales || matrix.dtype == DType::kF32 || matrix.dtype == DType::kBf16 || matrix.dtype == DType::kF16);
    CHECK_EQ(has_scales, matrix.scales != nullptr);
    CHECK(matrix.zeros == nullptr || matrix.dtype == DType::kU4);
    if (has_scales) {
      CHECK_GT(matrix.block_n, 0);
      CHECK_GT(matrix.block_k, 0);
      CHECK(matrix.scales_dtype == DType::kF32 || matrix.scales_dtype == DType::kBf16 ||
            matrix.scales_dtype == DType::kF16);
    }
  }
}

// Eight codes at a time: a model has billions.
void load_codes(const HostMatrix& matrix, int64_t n, uint8_t* out) {
  int64_t k = 0;
  if (matrix.dtype == DType::kI8) {
    const std::byte* codes = element_address(matrix, n, 0);
    for (; k + 8 <= matrix.k; k += 8) {
      const uint64_t word = load<uint64_t>(codes + k) ^ 0x8080808080808080U;
      std::memcpy(out + k, &word, sizeof word);
    }
    for (; k < matrix.k; ++k) out[k] = static_cast<uint8_t>(std::to_integer<uint8_t>(codes[k]) ^ 0x80U);
    return;
  }
  CHECK_EQ(matrix.dtype, DType::kU4);
  const std::byte* pairs = matrix.data + n * (((matrix.row_stride == 0 ? matrix.k : matrix.row_stride) + 1) / 2);
  for (; k + 8 <= matrix.k; k += 8) {
    uint64_t word = load<uint32_t>(pairs + k / 2);  // spread its nibbles over bytes
    word = (word | word << 16U) & 0x0000FFFF0000FFFFU;
    word = (word | word << 8U) & 0x00FF00FF00FF00FFU;
    word = (word | word << 4U) & 0x0F0F0F0F0F0F0F0FU;
    std::memcpy(out + k, &word, sizeof word);
  }
  for (; k < matrix.k; ++k) {
    const uint8_t pair = std::to_integer<uint8_t>(pairs[k / 2]);
    out[k] = k % 2 == 0 ? pair & 0x0FU : static_cast<uint8_t>(pair >> 4U);
  }
}

float load_scale(const HostMatrix& matrix, int64_t index) {
  return load_float(matrix.scales + index * dtype_bytes(matrix.scales_dtype), matrix.scales_dtype);
}

void decode_row(const HostMatrix& matrix, int64_t n, int64_t first, int64_t count, float* out) {
  const std::byte* source = matrix.dtype == DType::kU4 ? nullptr : element_address(matrix, n, first);
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
    case DType::kI8:
    case DType::kU4:
      decode_scaled_row(matrix, n, first, count, out);
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
