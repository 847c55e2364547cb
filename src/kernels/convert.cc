#include "src/kernels/convert.h"

#include <algorithm>
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

uint16_t f16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000U;
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7E00U);
  if (magnitude >= 0x47800000U) return static_cast<uint16_t>(sign | 0x7C00U);  // 2^16
  if (magnitude < 0x38800000U) {  // below the normal numbers codes are multiples of 2^-24, as are sums with 1/2
    const uint32_t steps = std::bit_cast<uint32_t>(std::abs(value) + 0.5F) - std::bit_cast<uint32_t>(0.5F);
    return static_cast<uint16_t>(sign | steps);
  }
  const uint32_t rounded = (magnitude + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
  return static_cast<uint16_t>(sign | (rounded - (112U << 10)));
}

float float_from_f8e4m3(uint8_t bits) {
  const float sign = (bits & 0x80U) != 0 ? -1.0F : 1.0F;
  const int exponent = (bits >> 3) & 0x0F;
  const int mantissa = bits & 0x07;
  if (exponent == 0x0F && mantissa == 0x07) return std::numeric_limits<float>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -9);
  return sign * std::ldexp(static_cast<float>(mantissa + 8), exponent - 10);
}

uint8_t f8e4m3_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 31 << 7;
  const float magnitude = std::min(std::abs(value), kF8Largest);
  if (magnitude < 0x1p-6F) {  // below the normal numbers codes are multiples of 2^-9, as are sums with 2^14
    const uint32_t steps = std::bit_cast<uint32_t>(magnitude + 0x1p14F) - std::bit_cast<uint32_t>(0x1p14F);
    return static_cast<uint8_t>(sign | steps);
  }
  const uint32_t wide = std::bit_cast<uint32_t>(magnitude);
  const uint32_t rounded = (wide + 0x7FFFFU + ((wide >> 20) & 1U)) >> 20;
  return static_cast<uint8_t>(sign | (rounded - (120U << 3)));
}

float quantize_f8e4m3(const float* values, int64_t count, uint8_t* codes) {
  uint32_t largest = 0;  // magnitudes order as their bits do, and NaN comes last
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::bit_cast<uint32_t>(values[i]) & 0x7FFFFFFFU);
  }
  if (largest < kF8LeastMagnitude || largest >= 0x7F800000U) {
    std::fill_n(codes, count, uint8_t{0});
    return largest < kF8LeastMagnitude ? 0.0F : std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::bit_cast<float>(largest) / kF8Largest;
  for (int64_t i = 0; i < count; ++i) codes[i] = f8e4m3_from_float(values[i] / scale);
  return scale;
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
  std::string name = format.type == WeightType::kBf16 ? "bf16" : format.type == WeightType::kInt8 ? "int8" : "int4";
  if (format.group_size > 0) name += " g" + std::to_string(format.group_size);
  return name + " a" + std::to_string(format.activation_bits);
}

}  // namespace tandem::kernels
