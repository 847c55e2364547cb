// Integer forms of weight rows and activation rows: the definitions (WeightFormat in ops.h tells the idea). The
// reference uses them as they are; vector code in cpu/ gives the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "src/kernels/ops.h"

namespace tandem::kernels {

// Columns of a group are a multiple of this, but for the last group of a row.
inline constexpr int64_t kGroupMultiple = 16;
// Most columns of a group: so many products of a code below 256 with one in -128 … 127 fit into an int32.
inline constexpr int64_t kMaxGroupColumns = 65'536;
// Below this a group counts as all zeros: the inverse of its scale would not be finite.
inline constexpr float kLeastMagnitude = 1e-30F;

// Largest code of an activation row.
inline constexpr int64_t activation_limit(const WeightFormat& format) {
  return format.activation_bits == 8 ? 127 : 127 * 256;
}
// Codes of weights are unsigned; this one stands for 0 where a group has no zero of its own.
inline constexpr int64_t middle_code(WeightType type) { return type == WeightType::kInt8 ? 128 : 8; }

// A weight that is quantised in groups has scales of 16 bits: one of this range is rounded to f16 first, to within
// 2^-8 of it, and the codes are those of the rounded scale. Others stay as they are.
inline constexpr float kLeastRoundedScale = 0x1p-17F;
inline constexpr float kMostRoundedScale = 65504.0F;  // the largest f16
float round_weight_scale(float scale, const WeightFormat& format);

inline constexpr int64_t group_columns(int64_t k, const WeightFormat& format) {
  return format.group_size == 0 || format.group_size > k ? k : format.group_size;
}
inline constexpr int64_t count_groups(int64_t k, const WeightFormat& format) {
  return (k + group_columns(k, format) - 1) / group_columns(k, format);
}

// w[i] = (codes[i] - zeros[g]) * scales[g], g the group of column i.
struct IntegerWeightRow {
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  std::vector<uint8_t> zeros;
};

// Row n of `matrix`: taken over where the matrix has the format's type and groups, else decoded and quantised.
// A value that is not finite makes its group's scale NaN.
void encode_weight_row(const HostMatrix& matrix, int64_t n, const WeightFormat& format, IntegerWeightRow* row);

// Whether encode_weight_row takes the matrix over code by code.
bool holds_format(const HostMatrix& matrix, const WeightFormat& format);
// Whether f16 holds the scales of row n exactly. `scratch` is the caller's.
bool has_f16_scales(const HostMatrix& matrix, int64_t n, const WeightFormat& format, IntegerWeightRow* scratch);
// Whether any group of any of the matrices, taken over, has a zero other than the middle code.
bool has_own_zeros(std::span<const HostMatrix> matrices, const WeightFormat& format);

// x[i] ≈ codes[i] * scales[g].
struct IntegerActivationRow {
  std::vector<int32_t> codes;
  std::vector<float> scales;
};

// scale = largest / limit, code = x * (limit / largest) to the nearest, ties to even. A value that is not finite makes
// its group's scale NaN and its codes 0.
void encode_activation_row(const float* x, int64_t k, const WeightFormat& format, IntegerActivationRow* row);

// A code of 16 bits is 256 * high + low, both in -128 … 127.
inline constexpr int32_t high_part(int32_t code) { return (code + 128) >> 8; }
inline constexpr int32_t low_part(int32_t code) { return code - 256 * high_part(code); }

}  // namespace tandem::kernels
