// What AVX-512 BF16 adds to simd_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tandem::kernels::cpu {
namespace {

// E4M3 magnitudes as bf16, which hold them exactly, by upper and lower byte.
struct F8Bytes {
  alignas(64) uint8_t high[128] = {};
  alignas(64) uint8_t low[128] = {};
};
constexpr F8Bytes make_f8_bytes() {
  F8Bytes bytes;
  for (unsigned code = 0; code < 128; ++code) {
    unsigned bits = (code << 4) + (120U << 7);
    if (code == 0x7F) bits = 0x7FC0;  // NaN
    if (code < 8) {                   // code * 2^-9
      unsigned exponent = 118 + 3;
      unsigned mantissa = code << 4;
      while (mantissa != 0 && mantissa < 128) {
        mantissa <<= 1;
        --exponent;
      }
      bits = code == 0 ? 0 : (exponent << 7) + (mantissa - 128);
    }
    bytes.high[code] = static_cast<uint8_t>(bits >> 8);
    bytes.low[code] = static_cast<uint8_t>(bits & 0xFF);
  }
  return bytes;
}
constexpr F8Bytes kF8Bytes = make_f8_bytes();

// 64 codes to bf16, the first 32 and the others.
TANDEM_INLINE void widen_f8(const uint8_t* p, Vec* first, Vec* second) {
  // Eights of bytes in the order in which the unpacking below puts them straight.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i codes = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(p));
  const __m512i magnitude =
      _mm512_permutex2var_epi8(_mm512_load_si512(kF8Bytes.high), codes, _mm512_load_si512(kF8Bytes.high + 64));
  const __m512i low =
      _mm512_permutex2var_epi8(_mm512_load_si512(kF8Bytes.low), codes, _mm512_load_si512(kF8Bytes.low + 64));
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m512i high = _mm512_ternarylogic_epi64(magnitude, codes, sign, 0xF8);  // magnitude | (codes & sign)
  *first = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
  *second = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
}
TANDEM_INLINE void widen_f8(const uint8_t* p, uint16_t* out) {
  Vec first;
  Vec second;
  widen_f8(p, &first, &second);
  _mm512_storeu_ps(out, first);
  _mm512_storeu_ps(out + 32, second);
}

TANDEM_INLINE __m256i narrow(Vec x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

// x * 2^n, rounded once.
TANDEM_INLINE Vec scale_by_power_once(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

// The same pair of bf16 in every lane.
TANDEM_INLINE Vec broadcast_pair(const uint16_t* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
}

// sum + x.second * w.second + x.first * w.first per lane, in the instruction's own fixed order and rounding.
TANDEM_INLINE Vec dot_pairs(Vec sum, Vec x, Vec w) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
}

}  // namespace
}  // namespace tandem::kernels::cpu
