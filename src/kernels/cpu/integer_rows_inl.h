// Rounds activation rows to integers (integer.h has the definition), for any vector width. Included by isa_*.cc after
// rows_inl.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "src/kernels/cpu/isa.h"
#include "src/kernels/integer.h"

namespace tandem::kernels::cpu {
namespace {

struct RowScaling {
  float scale;
  float inverse;
};

TANDEM_INLINE Vec magnitude(Vec x) { return max(x, sub(zero(), x)); }

TANDEM_INLINE RowScaling choose_row_scaling(const float* x, int64_t count, float limit) {
  Vec largest = zero();
  Vec faults = zero();  // stays 0 while every x is finite, else becomes NaN
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec value = load(x + i);
    largest = max(magnitude(value), largest);
    faults = fma(value, zero(), faults);
  }
  if (i < count) {
    const Vec value = load_first(x + i, count - i);
    largest = max(magnitude(value), largest);
    faults = fma(value, zero(), faults);
  }
  const float fault = sum_lanes(faults);
  const float most = max_lanes(largest);
  if (fault != 0.0F || !(most <= 3.4028234e38F)) return {__builtin_nanf(""), 0.0F};
  if (most < kLeastMagnitude) return {0.0F, 0.0F};
  return {most / limit, limit / most};
}

// Codes of x [count] into one or two planes `padded` bytes apart; returns what they sum up to in sums[plane].
template <int PLANES>
TANDEM_INLINE void write_codes(const float* x, int64_t count, float inverse, int64_t padded, std::byte* out,
                               int32_t* sums) {
  const Vec factor = broadcast(inverse);
  IntVec total[2] = {int_zero(), int_zero()};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec value = i + kLanes <= count ? load(x + i) : load_first(x + i, count - i);
    const IntVec code = inverse == 0.0F ? int_zero() : to_int(mul(value, factor));
    if constexpr (PLANES == 1) {
      store_low_bytes(out + i, code);
      total[0] = int_add(total[0], code);
    } else {
      const IntVec high = int_shift_right_8(int_add(code, int_broadcast(128)));
      const IntVec low = int_sub(code, int_shift_left_8(high));
      store_low_bytes(out + i, high);
      store_low_bytes(out + padded + i, low);
      total[0] = int_add(total[0], high);
      total[1] = int_add(total[1], low);
    }
  }
  for (int plane = 0; plane < PLANES; ++plane) sums[plane] = sum_int_lanes(total[plane]);
}

void to_integers(const float* x, const IntegerLayout& layout, std::byte* row) {
  float* scales = reinterpret_cast<float*>(row + layout.row_scales());
  int32_t* sums = reinterpret_cast<int32_t*>(row + layout.row_sums());
  for (int64_t plane = 0; plane < layout.planes; ++plane) {
    std::memset(row + plane * layout.padded + layout.k, 0, static_cast<size_t>(layout.padded - layout.k));
  }
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t first = g * layout.group;
    const int64_t count = layout.k - first < layout.group ? layout.k - first : layout.group;
    int32_t sum[2];
    const RowScaling scaling = choose_row_scaling(x + first, count, layout.planes == 1 ? 127.0F : 127.0F * 256.0F);
    if (layout.planes == 1) {
      write_codes<1>(x + first, count, scaling.inverse, layout.padded, row + first, sum);
    } else {
      write_codes<2>(x + first, count, scaling.inverse, layout.padded, row + first, sum);
    }
    scales[g] = scaling.scale;
    for (int64_t plane = 0; plane < layout.planes; ++plane) sums[plane * layout.groups + g] = sum[plane];
  }
}

}  // namespace
}  // namespace tandem::kernels::cpu
