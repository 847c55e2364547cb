// Sixteen f32 lanes of AVX-512 (F, BW, VL, DQ). Included by isa_avx512*.cc alone, inside their unnamed namespaces, so
// that no other file's code can end up with these instructions.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define TANDEM_INLINE inline __attribute__((always_inline))

namespace tandem::kernels::cpu {
namespace {

using Vec = __m512;
constexpr int64_t kLanes = 16;
constexpr int kGemmRows = 8;         // rows per tile; with two panels 16 sums: twice FMA latency (4) x units (2)
constexpr int kPairRows = 8;         // the same for bf16 pairs
constexpr int64_t kGemmDepth = 256;  // k per pass of many rows: two widened panels are 32 KiB of L1's 48
constexpr int64_t kWideRows = 24;    // up to here each panel goes over all of k at once
constexpr bool kWidenPanels = true;  // widening takes the units of FMA: once per pass, not once per tile (84 to 99 %)
// One row is bound by memory: more panels at once would only be more streams for the prefetcher to lose.
constexpr int gemm_panels(int rows) { return rows <= 2 ? 4 : 2; }
// Vectors of values, and of positions, per pass of attention's two products: 16 sums.
constexpr int accumulate_vectors(int queries) { return queries <= 2 ? 8 : 4; }
constexpr int score_vectors(int /*queries*/) { return 4; }

TANDEM_INLINE Vec zero() { return _mm512_setzero_ps(); }
TANDEM_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
TANDEM_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
TANDEM_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
TANDEM_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
TANDEM_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
TANDEM_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
TANDEM_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
TANDEM_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
// A NaN in b comes out.
TANDEM_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
TANDEM_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
TANDEM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }                // a * b + c
TANDEM_INLINE Vec subtract_product(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
TANDEM_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TANDEM_INLINE float first(Vec a) { return _mm512_cvtss_f32(a); }

TANDEM_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1U << count) - 1U); }
// The other lanes are zero, and their memory is not touched.
TANDEM_INLINE Vec load_first(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
TANDEM_INLINE void store_first(float* p, int64_t count, Vec x) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }
// x in the first `count` lanes, `other` in the rest.
TANDEM_INLINE Vec keep_first(Vec x, int64_t count, Vec other) {
  return _mm512_mask_blend_ps(first_lanes(count), other, x);
}

// x * 2^n for whole n in [-252, 254], in two steps so that results below the normal range and infinity come out right.
TANDEM_INLINE Vec scale_by_power(Vec x, Vec n) {
  const __m512i whole = _mm512_cvtps_epi32(n);
  const __m512i half = _mm512_srai_epi32(whole, 1);
  const __m512i bias = _mm512_set1_epi32(127);
  const __m512i low = _mm512_slli_epi32(_mm512_add_epi32(half, bias), 23);
  const __m512i high = _mm512_slli_epi32(_mm512_add_epi32(_mm512_sub_epi32(whole, half), bias), 23);
  return mul(mul(x, _mm512_castsi512_ps(low)), _mm512_castsi512_ps(high));
}

TANDEM_INLINE __m256 add_halves(Vec a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
// The sum of each of four vectors: halves added lane by lane, then quarters, then (0+2) + (1+3).
TANDEM_INLINE __m128 sum_lanes(Vec a, Vec b, Vec c, Vec d) {
  const __m256 w = add_halves(a), x = add_halves(b), y = add_halves(c), z = add_halves(d);
  const __m256 wx = _mm256_add_ps(_mm256_unpacklo_ps(w, x), _mm256_unpackhi_ps(w, x));
  const __m256 yz = _mm256_add_ps(_mm256_unpacklo_ps(y, z), _mm256_unpackhi_ps(y, z));
  const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(wx, yz, 0x44), _mm256_shuffle_ps(wx, yz, 0xEE));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}
TANDEM_INLINE float sum_lanes(Vec a) { return _mm_cvtss_f32(sum_lanes(a, a, a, a)); }
TANDEM_INLINE float max_lanes(Vec a) {
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

// bf16 values [2 * kLanes] as pairs: the first and the second of each.
TANDEM_INLINE Vec load_first_of_pairs(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
TANDEM_INLINE Vec load_second_of_pairs(const uint16_t* p) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
  return _mm512_castsi512_ps(_mm512_and_si512(mask, _mm512_loadu_si512(p)));
}

TANDEM_INLINE Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
TANDEM_INLINE Vec load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
TANDEM_INLINE void load_bf16(const uint16_t* p, Vec* low, Vec* high) {
  *low = load_bf16(p);
  *high = load_bf16(p + kLanes);
}
TANDEM_INLINE void store_bf16(uint16_t* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}

// Integers: sixteen lanes of 32 bits, or four times as many of 8.
using IntVec = __m512i;
constexpr int kIntegerRows = 8;  // rows per tile of integer products; with two panels 16 sums of the 32 registers
constexpr int integer_panels(int rows) { return rows <= 2 ? 4 : 2; }

TANDEM_INLINE IntVec int_zero() { return _mm512_setzero_si512(); }
TANDEM_INLINE IntVec int_broadcast(int32_t x) { return _mm512_set1_epi32(x); }
TANDEM_INLINE IntVec int_load(const void* p) { return _mm512_loadu_si512(p); }
TANDEM_INLINE IntVec int_add(IntVec a, IntVec b) { return _mm512_add_epi32(a, b); }
TANDEM_INLINE IntVec int_sub(IntVec a, IntVec b) { return _mm512_sub_epi32(a, b); }
TANDEM_INLINE IntVec int_mul(IntVec a, IntVec b) { return _mm512_mullo_epi32(a, b); }
TANDEM_INLINE IntVec int_shift_left_8(IntVec a) { return _mm512_slli_epi32(a, 8); }
TANDEM_INLINE IntVec int_shift_right_4(IntVec a) { return _mm512_srai_epi32(a, 4); }
TANDEM_INLINE IntVec int_shift_right_8(IntVec a) { return _mm512_srai_epi32(a, 8); }
TANDEM_INLINE IntVec to_int(Vec a) { return _mm512_cvtps_epi32(a); }
TANDEM_INLINE Vec to_float(IntVec a) { return _mm512_cvtepi32_ps(a); }
TANDEM_INLINE int32_t sum_int_lanes(IntVec a) { return _mm512_reduce_add_epi32(a); }
// The low byte of each lane.
TANDEM_INLINE void store_low_bytes(std::byte* p, IntVec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
TANDEM_INLINE IntVec load_bytes(const std::byte* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Nibbles of bytes, as bytes.
TANDEM_INLINE IntVec low_nibbles(IntVec a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
TANDEM_INLINE IntVec high_nibbles(IntVec a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }

// Masks of the nibbles of bytes, kept in registers.
struct NibbleMasks {
  IntVec low = _mm512_set1_epi8(15);
  IntVec high = _mm512_set1_epi8(-16);
  TANDEM_INLINE NibbleMasks() { asm("" : "+v"(low), "+v"(high)); }
};
// One instruction with the load: the compiler would load once and mask twice, which fills the core's window sooner.
TANDEM_INLINE IntVec load_masked(const void* p, IntVec mask) {
  IntVec result;
  asm("vpandq %2, %1, %0" : "=v"(result) : "v"(mask), "m"(*static_cast<const IntVec*>(p)));
  return result;
}

#ifdef TANDEM_DOT_BYTES
constexpr bool kDotsAnyByte = true;  // dot_nibbles takes codes up to 255
using ByteCodes = IntVec;
TANDEM_INLINE ByteCodes split_bytes(IntVec codes) { return codes; }
// sums + Σ of four products per lane, of unsigned codes < 16 with signed x.
TANDEM_INLINE IntVec dot_nibbles(IntVec sums, IntVec codes, IntVec x) { return _mm512_dpbusd_epi32(sums, codes, x); }
// The same of codes < 256.
TANDEM_INLINE IntVec dot_bytes(IntVec sums, ByteCodes codes, IntVec x) { return _mm512_dpbusd_epi32(sums, codes, x); }
#else
constexpr bool kDotsAnyByte = false;
// Without VNNI pairs of products are added in 16 bits, which holds them exactly only if the codes are below 128: codes
// of 8 bits are multiplied nibble by nibble.
struct ByteCodes {
  IntVec low;
  IntVec high;
};
TANDEM_INLINE ByteCodes split_bytes(IntVec codes) { return {low_nibbles(codes), high_nibbles(codes)}; }
TANDEM_INLINE IntVec dot_nibbles(IntVec sums, IntVec codes, IntVec x) {
  return int_add(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1)));
}
TANDEM_INLINE IntVec dot_bytes(IntVec sums, const ByteCodes& codes, IntVec x) {
  sums = dot_nibbles(sums, codes.low, x);
  return int_add(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(codes.high, x), _mm512_set1_epi16(16)));
}
#endif

// E4M3 codes in 4 bytes each, their upper bits zero. As f32 bits a code is 2^-120 of its value, subnormal ones too.
TANDEM_INLINE Vec decode_f8(__m512i codes) {
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(0x80)), 24);
  const __m512i magnitude = _mm512_slli_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(0x7F)), 20);
  return mul(_mm512_castsi512_ps(_mm512_or_si512(sign, magnitude)), broadcast(0x1p120F));
}
TANDEM_INLINE Vec load_f8(const uint8_t* p) {
  return decode_f8(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
TANDEM_INLINE void load_f8_pairs(const uint8_t* p, Vec* first, Vec* second) {
  const __m512i pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  *first = decode_f8(_mm512_and_si512(pairs, _mm512_set1_epi32(0xFF)));
  *second = decode_f8(_mm512_srli_epi32(pairs, 8));
}
// f8e4m3_from_float of convert.h.
TANDEM_INLINE void store_f8(uint8_t* p, Vec x) {
  const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(_mm512_castps_si512(x), 31), 7);
  const Vec magnitude = min(_mm512_abs_ps(x), broadcast(448.0F));
  const __m512i bits = _mm512_castps_si512(magnitude);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFFF)));
  const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32(120 << 3));
  const Vec base = broadcast(0x1p14F);
  const __m512i steps = _mm512_sub_epi32(_mm512_castps_si512(add(magnitude, base)), _mm512_castps_si512(base));
  const __mmask16 is_small = _mm512_cmp_ps_mask(magnitude, broadcast(0x1p-6F), _CMP_LT_OQ);
  const __m512i code = _mm512_or_si512(sign, _mm512_mask_mov_epi32(normal, is_small, steps));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(code));
}
// The largest magnitude's bits, per lane.
TANDEM_INLINE Vec max_magnitude(Vec a, Vec x) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF));
  return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), bits));
}
TANDEM_INLINE uint32_t largest_bits(Vec a) { return _mm512_reduce_max_epu32(_mm512_castps_si512(a)); }

// out[c * out_stride + r] = rows[r][c] for kLanes rows and columns.
TANDEM_INLINE void transpose_square(const float* const* rows, int64_t first, float* out, int64_t out_stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) a[r] = load(rows[r] + first);
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {  // a[r + i]: column i of each quarter, rows r … r + 3
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512d low = _mm512_castps_pd(b[r + half]), high = _mm512_castps_pd(b[r + 2 + half]);
      a[r + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[r + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // columns i, i + 4, i + 8 and i + 12
    const __m512 even_low = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xDD);
    const __m512 even_high = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xDD);
    store(out + i * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    store(out + (i + 4) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    store(out + (i + 8) * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0xDD));
    store(out + (i + 12) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD));
  }
}

}  // namespace
}  // namespace tandem::kernels::cpu
