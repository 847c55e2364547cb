#include "src/kernels/integer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "src/base/check.h"
#include "src/kernels/convert.h"
#include "src/kernels/host_matrix.h"

namespace tandem::kernels {
namespace {

// Scale and its inverse for values of at most `largest` in codes of at most `limit`.
struct Scaling {
  float scale = 0.0F;
  float inverse = 0.0F;
};

Scaling choose_scaling(const float* x, int64_t count, int64_t limit) {
  float largest = 0.0F;
  bool is_finite = true;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::abs(x[i]));
    is_finite = is_finite && std::isfinite(x[i]);
  }
  if (!is_finite) return {std::numeric_limits<float>::quiet_NaN(), 0.0F};
  if (largest < kLeastMagnitude) return {};
  return {largest / static_cast<float>(limit), static_cast<float>(limit) / largest};
}

int32_t to_code(float x, float inverse, int64_t limit) {
  if (inverse == 0.0F) return 0;
  return std::clamp(static_cast<int32_t>(std::nearbyintf(x * inverse)), -static_cast<int32_t>(limit),
                    static_cast<int32_t>(limit));
}

void take_over(const HostMatrix& matrix, int64_t n, const WeightFormat& format, IntegerWeightRow* row) {
  load_codes(matrix, n, row->codes.data());
  const int64_t groups = std::ssize(row->scales);
  for (int64_t g = 0; g < groups; ++g) {
    const size_t i = static_cast<size_t>(g);
    const int64_t at = n / matrix.block_n * groups + g;
    row->scales[i] = load_scale(matrix, at);
    row->zeros[i] = matrix.zeros == nullptr ? static_cast<uint8_t>(middle_code(format.type))
                                            : std::to_integer<uint8_t>(matrix.zeros[at]);
  }
}

void quantise(const HostMatrix& matrix, int64_t n, const WeightFormat& format, IntegerWeightRow* row) {
  const int64_t limit = format.type == WeightType::kInt8 ? 127 : 7;
  const int32_t middle = static_cast<int32_t>(middle_code(format.type));
  const int64_t columns = group_columns(matrix.k, format);
  constexpr int64_t kChunk = 1024;
  std::vector<float> values(static_cast<size_t>(columns));
  for (int64_t g = 0; g < std::ssize(row->scales); ++g) {
    const int64_t first = g * columns;
    const int64_t count = std::min(columns, matrix.k - first);
    for (int64_t i = 0; i < count; i += kChunk) {
      decode_row(matrix, n, first + i, std::min(kChunk, count - i), values.data() + i);
    }
    Scaling scaling = choose_scaling(values.data(), count, limit);
    const float rounded = round_weight_scale(scaling.scale, format);
    if (rounded != scaling.scale && scaling.inverse != 0.0F) scaling = {rounded, 1.0F / rounded};
    row->scales[static_cast<size_t>(g)] = scaling.scale;
    row->zeros[static_cast<size_t>(g)] = static_cast<uint8_t>(middle);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t code = to_code(values[static_cast<size_t>(i)], scaling.inverse, limit);
      row->codes[static_cast<size_t>(first + i)] = static_cast<uint8_t>(code + middle);
    }
  }
}

}  // namespace

float round_weight_scale(float scale, const WeightFormat& format) {
  if (format.group_size == 0 || !(scale >= kLeastRoundedScale && scale <= kMostRoundedScale)) return scale;
  return float_from_f16(f16_from_float(scale));
}

bool holds_format(const HostMatrix& matrix, const WeightFormat& format) {
  const DType dtype = format.type == WeightType::kInt8 ? DType::kI8 : DType::kU4;
  if (matrix.dtype != dtype) return false;
  return std::min(matrix.block_k, matrix.k) == group_columns(matrix.k, format);
}

bool has_own_zeros(std::span<const HostMatrix> matrices, const WeightFormat& format) {
  for (const HostMatrix& matrix : matrices) {
    if (!holds_format(matrix, format) || matrix.zeros == nullptr) continue;
    const int64_t count = (matrix.n + matrix.block_n - 1) / matrix.block_n * count_groups(matrix.k, format);
    const std::byte middle{static_cast<uint8_t>(middle_code(format.type))};
    if (std::any_of(matrix.zeros, matrix.zeros + count, [&](std::byte zero) { return zero != middle; })) return true;
  }
  return false;
}

bool has_f16_scales(const HostMatrix& matrix, int64_t n, const WeightFormat& format, IntegerWeightRow* scratch) {
  if (!holds_format(matrix, format)) {
    encode_weight_row(matrix, n, format, scratch);
    return std::all_of(scratch->scales.begin(), scratch->scales.end(), is_f16);
  }
  const int64_t groups = count_groups(matrix.k, format);
  for (int64_t g = 0; g < groups; ++g) {
    if (!is_f16(load_scale(matrix, n / matrix.block_n * groups + g))) return false;
  }
  return true;
}

void encode_weight_row(const HostMatrix& matrix, int64_t n, const WeightFormat& format, IntegerWeightRow* row) {
  const size_t groups = static_cast<size_t>(count_groups(matrix.k, format));
  row->codes.resize(static_cast<size_t>(matrix.k));
  row->scales.resize(groups);
  row->zeros.resize(groups);
  if (holds_format(matrix, format)) {
    take_over(matrix, n, format, row);
  } else {
    quantise(matrix, n, format, row);
  }
}

void encode_activation_row(const float* x, int64_t k, const WeightFormat& format, IntegerActivationRow* row) {
  const int64_t limit = activation_limit(format);
  const int64_t columns = group_columns(k, format);
  row->codes.resize(static_cast<size_t>(k));
  row->scales.resize(static_cast<size_t>(count_groups(k, format)));
  for (int64_t g = 0; g < std::ssize(row->scales); ++g) {
    const int64_t first = g * columns;
    const int64_t count = std::min(columns, k - first);
    const Scaling scaling = choose_scaling(x + first, count, limit);
    row->scales[static_cast<size_t>(g)] = scaling.scale;
    for (int64_t i = first; i < first + count; ++i) {
      row->codes[static_cast<size_t>(i)] = to_code(x[i], scaling.inverse, limit);
    }
  }
}

}  // namespace tandem::kernels
