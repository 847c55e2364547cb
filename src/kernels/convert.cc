#include "src/kernels/convert.h"

#include <bit>
#include <cmath>
#include <limits>

#include "src/kernels/ops.h"
#include "src/kernels/tensor.h"

namespace tandem::kernels {

float float_from_f16(uint16_t bits) {
  const float sign = (bits & 0x8000U) != 0 ? -1.0F : 1.0F;
  if ((bits & 0x7C00U) == 0x7C00U) {
    return (bits & 0x3FFU) != 0 ? std::numeric_limits<float>::quiet_NaN()
                                : sign * std::numeric_limits<float>::infinity();
  }
  // The exponents' biases are 15 and 127. Exact for subnormals, too.
  return sign * (std::bit_cast<float>(static_cast<uint32_t>(bits & 0x7FFFU) << 13) * 0x1p112F);
}

float float_from_f8e4m3(uint8_t bits) {
  const float sign = (bits & 0x80U) != 0 ? -1.0F : 1.0F;
  const int exponent = (bits >> 3) & 0x0F;
  const int mantissa = bits & 0x07;
  if (exponent == 0x0F && mantissa == 0x07) return std::numeric_limits<float>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -9);
  return sign * std::ldexp(static_cast<float>(mantissa + 8), exponent - 10);
}

const std::array<float, 256>& f8e4m3_table() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> values{};
    for (size_t code = 0; code < values.size(); ++code) values[code] = float_from_f8e4m3(static_cast<uint8_t>(code));
    return values;
  }();
  return table;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBf16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kF8E4M3:
      return "f8_e4m3";
    case DType::kI8:
      return "i8";
    case DType::kU8:
      return "u8";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
    case DType::kU4:
      return "u4";
  }
  return "unknown";
}

std::string weight_format_name(const WeightFormat& format) {
  if (format == kF32Weights) return "f32";
  if (format == kBf16Weights) return "bf16";
  std::string name = format.type == WeightType::kInt8 ? "int8" : "int4";
  if (format.group_size > 0) name += " g" + std::to_string(format.group_size);
  return name + " a" + std::to_string(format.activation_bits);
}

}  // namespace tandem::kernels
