#include "src/kernels/expert_rows.h"

#include <cstring>

namespace tandem::kernels {

const char* row_format_name(RowFormat format) {
  switch (format) {
    case RowFormat::kExact: return "exact";
    case RowFormat::kBf16: return "bf16";
    case RowFormat::kInt8: return "int8";
    case RowFormat::kF8E4M3: return "fp8";
  }
  return "unknown";
}

Result<RowFormat> parse_row_format(std::string_view name) {
  for (const RowFormat format : {RowFormat::kExact, RowFormat::kBf16, RowFormat::kInt8, RowFormat::kF8E4M3}) {
    if (name == row_format_name(format)) return format;
  }
  return invalid_argument("dispatch-format", "rows cannot travel as \"{}\"; choose exact, bf16, int8 or fp8", name);
}

int64_t rounded_row_bytes(RowFormat format, int64_t k) {
  CHECK(format != RowFormat::kExact);
  if (format == RowFormat::kBf16) return round_up_row(k * int64_t{sizeof(uint16_t)});
  const int64_t sum_bytes = format == RowFormat::kInt8 ? int64_t{sizeof(int32_t)} : 0;
  return round_up_row(row_scale_offset(format, k) + int64_t{sizeof(float)} + sum_bytes);
}

void decode_int8_row(const std::byte* row, int64_t k, float* out) {
  float scale = 0.0F;
  std::memcpy(&scale, row + row_scale_offset(RowFormat::kInt8, k), sizeof(scale));
  const int8_t* codes = reinterpret_cast<const int8_t*>(row);
  for (int64_t i = 0; i < k; ++i) out[i] = static_cast<float>(codes[i]) * scale;
}

}  // namespace tandem::kernels
