#include "src/model/integer_rows.h"

#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "src/base/check.h"
#include "src/kernels/integer.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::HostMatrix;
using kernels::WeightFormat;
using kernels::WeightType;

constexpr int32_t kInfinityBits = 0x7F800000;
// 1.5 * 2^23: adding it to a small float leaves the nearest integer, ties to even, in the low bits.
constexpr float kRoundingShift = 12582912.0F;

// Largest magnitude, as bits: they order like the values, and NaN and infinity come out on top.
int32_t largest_bits(const float* values, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = std::bit_cast<int32_t>(values[i]) & 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

int32_t round_to_code(float value, int32_t limit) {
  const int32_t code = std::bit_cast<int32_t>(value + kRoundingShift) - std::bit_cast<int32_t>(kRoundingShift);
  return std::clamp(code, -limit, limit);
}

void write_bytes(const float* values, int64_t count, float inverse, std::byte* out) {
  int8_t* codes = reinterpret_cast<int8_t*>(out);
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(round_to_code(values[i] * inverse, 127));
}

// Codes 1 … 15, the even column in the low nibble. Groups begin at even columns.
void write_nibbles(const float* values, int64_t count, float inverse, std::byte* out) {
  constexpr int64_t kChunk = 256;
  std::array<uint8_t, kChunk> codes;
  for (int64_t done = 0; done < count; done += kChunk) {
    const int64_t chunk = std::min(kChunk, count - done);
    for (int64_t i = 0; i < chunk; ++i) {
      codes[static_cast<size_t>(i)] = static_cast<uint8_t>(round_to_code(values[done + i] * inverse, 7) + 8);
    }
    if (chunk % 2 == 1) codes[static_cast<size_t>(chunk)] = 0;
    for (int64_t i = 0; i < (chunk + 1) / 2; ++i) {
      const size_t even = static_cast<size_t>(2 * i);
      out[done / 2 + i] = std::byte(static_cast<uint8_t>(codes[even] | (codes[even + 1] << 4U)));
    }
  }
}

bool quantise_group(const float* values, int64_t count, const WeightFormat& format, float* scale, std::byte* out) {
  const int32_t bits = largest_bits(values, count);
  const float largest = std::bit_cast<float>(bits);
  const float limit = format.type == WeightType::kInt8 ? 127.0F : 7.0F;
  const bool is_zero = bits >= kInfinityBits || largest < kernels::kLeastMagnitude;
  const float exact = is_zero ? 0.0F : largest / limit;
  *scale = kernels::round_weight_scale(exact, format);
  if (bits >= kInfinityBits) return false;
  const float inverse = is_zero ? 0.0F : *scale == exact ? limit / largest : 1.0F / *scale;
  if (format.type == WeightType::kInt8) {
    write_bytes(values, count, inverse, out);
  } else {
    write_nibbles(values, count, inverse, out);
  }
  return true;
}

}  // namespace

int64_t code_bytes_of(int64_t k, WeightType type) { return type == WeightType::kInt8 ? k : (k + 1) / 2; }

void IntegerBuffer::resize(int64_t rows, int64_t k, const WeightFormat& format, bool has_zeros) {
  num_rows_ = rows;
  k_ = k;
  format_ = format;
  rows_.code_bytes = code_bytes_of(k, format.type);
  rows_.groups = kernels::count_groups(k, format);
  const int64_t scale_bytes = rows * rows_.groups * int64_t{sizeof(float)};
  const int64_t zero_bytes = has_zeros ? rows * rows_.groups : 0;
  const int64_t bytes = scale_bytes + rows * rows_.code_bytes + zero_bytes;
  if (bytes > capacity_) {
    memory_.reset();
    memory_ = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(bytes));
    capacity_ = bytes;
  }
  rows_.scales = reinterpret_cast<float*>(memory_.get());
  rows_.codes = memory_.get() + scale_bytes;
  rows_.zeros = has_zeros ? rows_.codes + rows * rows_.code_bytes : nullptr;
}

std::vector<HostMatrix> IntegerBuffer::matrices(int64_t rows_per_matrix) const {
  CHECK_EQ(num_rows_ % rows_per_matrix, 0);
  std::vector<HostMatrix> matrices;
  for (int64_t first = 0; first < num_rows_; first += rows_per_matrix) {
    const IntegerRows part = rows_.from(first);
    HostMatrix matrix;
    matrix.data = part.codes;
    matrix.dtype = format_.type == WeightType::kInt8 ? DType::kI8 : DType::kU4;
    matrix.n = rows_per_matrix;
    matrix.k = k_;
    matrix.scales = reinterpret_cast<const std::byte*>(part.scales);
    matrix.block_n = 1;
    matrix.block_k = kernels::group_columns(k_, format_);
    matrix.zeros = part.zeros;
    matrices.push_back(matrix);
  }
  return matrices;
}

bool quantise_rows(const float* values, int64_t count, int64_t k, const WeightFormat& format, const IntegerRows& out) {
  const int64_t columns = kernels::group_columns(k, format);
  CHECK(columns % 2 == 0 || columns == k);
  bool is_finite = true;
  for (int64_t row = 0; row < count; ++row) {
    const IntegerRows target = out.from(row);
    for (int64_t g = 0; g < out.groups; ++g) {
      const int64_t first = g * columns;
      is_finite &= quantise_group(values + row * k + first, std::min(columns, k - first), format, target.scales + g,
                                  target.codes + code_bytes_of(first, format.type));
    }
  }
  return is_finite;
}

void floats_from_bf16(const uint16_t* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = std::bit_cast<float>(static_cast<uint32_t>(values[i]) << 16U);
}

}  // namespace tandem::model
