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

// E4M3FN: bias 7, largest 448, no infinities, NaN = 0x7F and 0xFF.
float float_from_f8e4m3(uint8_t bits);

// float_from_f8e4m3 of all 256 codes.
const std::array<float, 256>& f8e4m3_table();

}  // namespace tandem::kernels
