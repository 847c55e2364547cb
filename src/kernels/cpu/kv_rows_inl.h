// Rows of keys and values on their way into the cache and out of it, for any vector width. Included by isa_*.cc after
// its simd_*.h.
#pragma once

#include <cstdint>

#include "src/kernels/cpu/isa.h"

namespace tandem::kernels::cpu {
namespace {

void transpose(const float* const* rows, int64_t count, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < kSlab; r += kLanes) {
    for (int64_t i = 0; i < count; i += kLanes) transpose_square(rows + r, i, out + i * out_stride + r, out_stride);
  }
}

void split_pairs_bf16(const uint16_t* x, int64_t count, float* first, float* second) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(first + i, load_first_of_pairs(x + 2 * i));
    store(second + i, load_second_of_pairs(x + 2 * i));
  }
}

void split_pairs_f8(const uint8_t* x, int64_t count, float* first, float* second) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Vec a;
    Vec b;
    load_f8_pairs(x + 2 * i, &a, &b);
    store(first + i, a);
    store(second + i, b);
  }
}

void from_f8(const uint8_t* x, int64_t count, float scale, float* out) {
  const Vec factor = broadcast(scale);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, mul(load_f8(x + i), factor));
  if (i == count) return;
  uint8_t tail[kLanes] = {};
  for (int64_t j = i; j < count; ++j) tail[j - i] = x[j];
  store_first(out + i, count - i, mul(load_f8(tail), factor));
}

void f8_to_bf16(const uint8_t* x, int64_t count, uint16_t* out) {
  int64_t i = 0;
#ifdef TANDEM_DOT_PAIRS
  for (; i + 64 <= count; i += 64) widen_f8(x + i, out + i);
#endif
  for (; i + kLanes <= count; i += kLanes) store_bf16(out + i, load_f8(x + i));
  if (i == count) return;
  uint8_t tail[kLanes] = {};
  uint16_t values[kLanes];
  for (int64_t j = i; j < count; ++j) tail[j - i] = x[j];
  store_bf16(values, load_f8(tail));
  for (int64_t j = i; j < count; ++j) out[j] = values[j - i];
}

float quantize_f8(const float* x, int64_t count, uint8_t* codes) {
  Vec largest_lanes = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    largest_lanes = max_magnitude(largest_lanes, count - i >= kLanes ? load(x + i) : load_first(x + i, count - i));
  }
  const uint32_t largest = largest_bits(largest_lanes);
  constexpr uint32_t kLeast = (127U - 100U) << 23;  // 2^-100
  if (largest < kLeast || largest >= 0x7F800000U) {
    for (int64_t i = 0; i < count; ++i) codes[i] = 0;
    return largest < kLeast ? 0.0F : __builtin_nanf("");
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &largest, sizeof(magnitude));
  const float scale = magnitude / 448.0F;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_f8(codes + i, div(load(x + i), broadcast(scale)));
  if (i == count) return scale;
  uint8_t tail[kLanes];
  store_f8(tail, div(load_first(x + i, count - i), broadcast(scale)));
  for (int64_t j = i; j < count; ++j) codes[j] = tail[j - i];
  return scale;
}

}  // namespace
}  // namespace tandem::kernels::cpu
