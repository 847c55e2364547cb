// What AVX-512 BF16 adds to simd_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tandem::kernels::cpu {
namespace {

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
