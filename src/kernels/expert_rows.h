// Rows on their way to experts elsewhere, in the formats that are alike on all backends (RowFormat but for kExact).
//  kBf16:   k values
//  kInt8:   an activation row of one group, as IntegerLayout says: codes padded to 16, f32 scale, int32 sum
//  kF8E4M3: k codes, padded to 4, f32 scale
#pragma once

#include <cstdint>

#include "src/kernels/integer.h"
#include "src/kernels/ops.h"

namespace tandem::kernels {

inline constexpr int64_t kEncodedRowMultiple = 64;  // of its bytes
inline constexpr WeightFormat kInt8Rows{WeightType::kInt8, 0, 8};

inline constexpr int64_t round_up_row(int64_t bytes) {
  return (bytes + kEncodedRowMultiple - 1) / kEncodedRowMultiple * kEncodedRowMultiple;
}
// Where the scale of a row lies. Not for kExact and kBf16.
inline constexpr int64_t row_scale_offset(RowFormat format, int64_t k) {
  const int64_t multiple = format == RowFormat::kInt8 ? kGroupMultiple : int64_t{sizeof(float)};
  return (k + multiple - 1) / multiple * multiple;
}
// Not for kExact.
int64_t rounded_row_bytes(RowFormat format, int64_t k);

// codes[i] * scale.
void decode_int8_row(const std::byte* row, int64_t k, float* out);

}  // namespace tandem::kernels
