// Eight f32 lanes of AVX2 with FMA. Included by isa_avx2.cc alone, inside its unnamed namespace, so that no other
// file's code can end up with these instructions.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define TANDEM_INLINE inline __attribute__((always_inline))

namespace tandem::kernels::cpu {
namespace {

using Vec = __m256;
constexpr int64_t kLanes = 8;
constexpr int kGemmRows = 6;          // rows per tile; with one panel 12 sums, 2 weights, 1 x: 15 of 16 registers
constexpr int kPairRows = 5;          // the same for bf16 pairs, which want one register more for a mask
constexpr int64_t kGemmDepth = 512;   // k per pass of many rows: a panel in bf16 is 16 KiB, half of L1
constexpr int64_t kWideRows = 45;     // up to here each panel goes over all of k at once (measured)
constexpr bool kWidenPanels = false;  // widening is free: it runs on units that FMA does not use
constexpr int gemm_panels(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
// Vectors of values, and of positions, per pass of attention's two products.
constexpr int accumulate_vectors(int queries) { return queries <= 2 ? 4 : 2; }
constexpr int score_vectors(int queries) { return queries == 1 ? 8 : queries == 2 ? 4 : 2; }

TANDEM_INLINE Vec zero() { return _mm256_setzero_ps(); }
TANDEM_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
TANDEM_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
TANDEM_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
TANDEM_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
TANDEM_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
TANDEM_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
TANDEM_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
TANDEM_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
// A NaN in b comes out.
TANDEM_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
TANDEM_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
TANDEM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }                // a * b + c
TANDEM_INLINE Vec subtract_product(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
TANDEM_INLINE Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TANDEM_INLINE float first(Vec a) { return _mm256_cvtss_f32(a); }

// All bits set in the first `count` lanes, 0 <= count <= 8.
TANDEM_INLINE __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
// The other lanes are zero, and their memory is not touched.
TANDEM_INLINE Vec load_first(const float* p, int64_t count) { return _mm256_maskload_ps(p, first_lanes(count)); }
TANDEM_INLINE void store_first(float* p, int64_t count, Vec x) { _mm256_maskstore_ps(p, first_lanes(count), x); }
// x in the first `count` lanes, `other` in the rest.
TANDEM_INLINE Vec keep_first(Vec x, int64_t count, Vec other) {
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(first_lanes(count)));
}

// x * 2^n for whole n in [-252, 254], in two steps so that results below the normal range and infinity come out right.
TANDEM_INLINE Vec scale_by_power(Vec x, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return mul(mul(x, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high));
}

// Half h (128 bits) of a, b, c and d, each summed over its lanes as (0+2) + (1+3).
TANDEM_INLINE Vec sum_halves(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
}
// The sum of each of four vectors: lower half plus upper half, halves as above.
TANDEM_INLINE __m128 sum_lanes(Vec a, Vec b, Vec c, Vec d) {
  const Vec sums = sum_halves(a, b, c, d);
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}
TANDEM_INLINE float sum_lanes(Vec a) { return _mm_cvtss_f32(sum_lanes(a, a, a, a)); }
TANDEM_INLINE float max_lanes(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

// bf16 values [2 * kLanes] as pairs: the first and the second of each.
TANDEM_INLINE Vec load_first_of_pairs(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
}
TANDEM_INLINE Vec load_second_of_pairs(const uint16_t* p) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000U));
  return _mm256_castsi256_ps(_mm256_and_si256(mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}

TANDEM_INLINE Vec load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TANDEM_INLINE Vec load_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
// Twice as many at once, by fewer instructions.
TANDEM_INLINE void load_bf16(const uint16_t* p, Vec* low, Vec* high) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i a = _mm256_unpacklo_epi16(_mm256_setzero_si256(), bits);  // 0 … 3 and 8 … 11
  const __m256i b = _mm256_unpackhi_epi16(_mm256_setzero_si256(), bits);  // 4 … 7 and 12 … 15
  *low = _mm256_castsi256_ps(_mm256_permute2x128_si256(a, b, 0x20));
  *high = _mm256_castsi256_ps(_mm256_permute2x128_si256(a, b, 0x31));
}
TANDEM_INLINE void store_bf16(uint16_t* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet, is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// Integers: eight lanes of 32 bits, or four times as many of 8.
using IntVec = __m256i;
constexpr int kIntegerRows = 4;  // rows per tile of integer products: 8 sums of the 16 registers
constexpr int integer_panels(int rows) { return rows == 1 ? 2 : 1; }

TANDEM_INLINE IntVec int_zero() { return _mm256_setzero_si256(); }
TANDEM_INLINE IntVec int_broadcast(int32_t x) { return _mm256_set1_epi32(x); }
TANDEM_INLINE IntVec int_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TANDEM_INLINE IntVec int_add(IntVec a, IntVec b) { return _mm256_add_epi32(a, b); }
TANDEM_INLINE IntVec int_sub(IntVec a, IntVec b) { return _mm256_sub_epi32(a, b); }
TANDEM_INLINE IntVec int_mul(IntVec a, IntVec b) { return _mm256_mullo_epi32(a, b); }
TANDEM_INLINE IntVec int_shift_left_8(IntVec a) { return _mm256_slli_epi32(a, 8); }
TANDEM_INLINE IntVec int_shift_right_4(IntVec a) { return _mm256_srai_epi32(a, 4); }
TANDEM_INLINE IntVec int_shift_right_8(IntVec a) { return _mm256_srai_epi32(a, 8); }
TANDEM_INLINE IntVec to_int(Vec a) { return _mm256_cvtps_epi32(a); }
TANDEM_INLINE Vec to_float(IntVec a) { return _mm256_cvtepi32_ps(a); }
TANDEM_INLINE int32_t sum_int_lanes(IntVec a) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xB1)));
}
// The low byte of each lane.
TANDEM_INLINE void store_low_bytes(std::byte* p, IntVec a) {
  const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i packed = _mm256_shuffle_epi8(a, order);
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
}
TANDEM_INLINE IntVec load_bytes(const std::byte* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
// Nibbles of bytes, as bytes.
TANDEM_INLINE IntVec low_nibbles(IntVec a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
TANDEM_INLINE IntVec high_nibbles(IntVec a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
// Masks of the nibbles of bytes.
struct NibbleMasks {
  IntVec low = _mm256_set1_epi8(15);
  IntVec high = _mm256_set1_epi8(-16);
};
TANDEM_INLINE IntVec load_masked(const void* p, IntVec mask) { return _mm256_and_si256(int_load(p), mask); }
constexpr bool kDotsAnyByte = false;  // whether dot_nibbles takes codes up to 255

// Pairs of products are added in 16 bits, which holds them exactly only if the codes are below 128: codes of 8 bits are
// multiplied nibble by nibble.
struct ByteCodes {
  IntVec low;
  IntVec high;
};
TANDEM_INLINE ByteCodes split_bytes(IntVec codes) { return {low_nibbles(codes), high_nibbles(codes)}; }
// sums + Σ of four products per lane, of unsigned codes < 16 with signed x.
TANDEM_INLINE IntVec dot_nibbles(IntVec sums, IntVec codes, IntVec x) {
  return int_add(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
// The same of codes < 256.
TANDEM_INLINE IntVec dot_bytes(IntVec sums, const ByteCodes& codes, IntVec x) {
  sums = dot_nibbles(sums, codes.low, x);
  return int_add(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.high, x), _mm256_set1_epi16(16)));
}

// E4M3 codes in 4 bytes each, their upper bits zero. As f32 bits a code is 2^-120 of its value, subnormal ones too.
TANDEM_INLINE Vec decode_f8(__m256i codes) {
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(0x80)), 24);
  const __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(0x7F)), 20);
  return mul(_mm256_castsi256_ps(_mm256_or_si256(sign, magnitude)), broadcast(0x1p120F));
}
TANDEM_INLINE Vec load_f8(const uint8_t* p) {
  return decode_f8(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
TANDEM_INLINE void load_f8_pairs(const uint8_t* p, Vec* first, Vec* second) {
  const __m256i pairs = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  *first = decode_f8(_mm256_and_si256(pairs, _mm256_set1_epi32(0xFF)));
  *second = decode_f8(_mm256_srli_epi32(pairs, 8));
}
// f8e4m3_from_float of convert.h.
TANDEM_INLINE void store_f8(uint8_t* p, Vec x) {
  const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(_mm256_castps_si256(x), 31), 7);
  const Vec absolute = _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF)));
  const Vec magnitude = min(absolute, broadcast(448.0F));
  const __m256i bits = _mm256_castps_si256(magnitude);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFFF)));
  const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(rounded, 20), _mm256_set1_epi32(120 << 3));
  const Vec base = broadcast(0x1p14F);
  const __m256i steps = _mm256_sub_epi32(_mm256_castps_si256(add(magnitude, base)), _mm256_castps_si256(base));
  const __m256i is_small = _mm256_castps_si256(_mm256_cmp_ps(magnitude, broadcast(0x1p-6F), _CMP_LT_OQ));
  const __m256i code = _mm256_or_si256(sign, _mm256_blendv_epi8(normal, steps, is_small));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
// The largest magnitude's bits, per lane.
TANDEM_INLINE Vec max_magnitude(Vec a, Vec x) {
  const __m256i bits = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF));
  return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), bits));
}
TANDEM_INLINE uint32_t largest_bits(Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  __m128i x = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4E));
  x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(x));
}

// out[c * out_stride + r] = rows[r][c] for kLanes rows and columns.
TANDEM_INLINE void transpose_square(const float* const* rows, int64_t first, float* out, int64_t out_stride) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) a[r] = load(rows[r] + first);
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {  // a[r + i]: column i of each half, rows r … r + 3
    a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
    a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xEE);
    a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
    a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store(out + i * out_stride, _mm256_permute2f128_ps(a[i], a[4 + i], 0x20));
    store(out + (i + 4) * out_stride, _mm256_permute2f128_ps(a[i], a[4 + i], 0x31));
  }
}

}  // namespace
}  // namespace tandem::kernels::cpu
