// Number formats of checkpoints and caches, one value at a time. These are the definitions; vector code in cpu/ must
// give the same bits.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace tandem::kernels {

inline float float_from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline uint16_t bf16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<uint16_t>((bits >> 16) | 0x0040U);
  return static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

// IEEE binary16.
float float_from_f16(uint16_t bits);
// Round to nearest, ties to even; beyond the largest it becomes an infinity, and a NaN stays a (quiet) NaN.
uint16_t f16_from_float(float value);
// Whether binary16 holds the value exactly. Not a NaN.
inline bool is_f16(float value) { return float_from_f16(f16_from_float(value)) == value; }

// E4M3FN: bias 7, largest 448, no infinities, NaN = 0x7F and 0xFF.
float float_from_f8e4m3(uint8_t bits);

// Round to nearest, ties to even; beyond 448 it saturates. Not for a NaN.
uint8_t f8e4m3_from_float(float value);

// Writes `count` codes and returns their scale: code = f8e4m3(value / scale), scale = largest magnitude / 448. Vectors
// whose largest magnitude is below 2^-100 become zeros with scale 0; those with a NaN or an infinity zeros with a NaN.
float quantize_f8e4m3(const float* values, int64_t count, uint8_t* codes);
inline constexpr float kF8Largest = 448.0F;
inline constexpr uint32_t kF8LeastMagnitude = (127U - 100U) << 23;  // bits of 2^-100

// float_from_f8e4m3 of all 256 codes.
const std::array<float, 256>& f8e4m3_table();

}  // namespace tandem::kernels
