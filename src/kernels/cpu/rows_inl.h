// Operations on single rows, for any vector width. Included by isa_*.cc after its simd_*.h.
#pragma once

#include <cstdint>

namespace tandem::kernels::cpu {
namespace {

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7 (next term below 6e-9), 2^n by the
// exponent. exp(0) is exactly 1, below -104 the result is exactly 0, above 89 infinity; a NaN stays one.
TANDEM_INLINE Vec exp(Vec x) {
  x = min(broadcast(89.0F), max(broadcast(-104.0F), x));
  const Vec n = round(mul(x, broadcast(1.44269504F)));      // 1 / ln 2
  Vec r = subtract_product(n, broadcast(0.693147182F), x);  // ln 2 as f32
  r = subtract_product(n, broadcast(-1.90465433e-9F), r);   // ln 2 minus that f32
  Vec sum = broadcast(1.0F / 5040);
  sum = fma(sum, r, broadcast(1.0F / 720));
  sum = fma(sum, r, broadcast(1.0F / 120));
  sum = fma(sum, r, broadcast(1.0F / 24));
  sum = fma(sum, r, broadcast(1.0F / 6));
  sum = fma(sum, r, broadcast(1.0F / 2));
  sum = fma(sum, r, broadcast(1.0F));
  sum = fma(sum, r, broadcast(1.0F));
  return scale_by_power(sum, n);
}
TANDEM_INLINE float exp(float x) { return first(exp(broadcast(x))); }

TANDEM_INLINE Vec sigmoid(Vec x) { return div(broadcast(1.0F), add(broadcast(1.0F), exp(sub(zero(), x)))); }
TANDEM_INLINE Vec silu(Vec x) { return div(x, add(broadcast(1.0F), exp(sub(zero(), x)))); }

void to_bf16(const float* x, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_bf16(out + i, load(x + i));
  if (i == count) return;
  uint16_t tail[kLanes];
  store_bf16(tail, load_first(x + i, count - i));
  for (int64_t j = i; j < count; ++j) out[j] = tail[j - i];
}

void from_bf16(const uint16_t* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    Vec low;
    Vec high;
    load_bf16(x + i, &low, &high);
    store(out + i, low);
    store(out + i + kLanes, high);
  }
  for (; i + kLanes <= count; i += kLanes) store(out + i, load_bf16(x + i));
  if (i == count) return;
  uint16_t tail[kLanes] = {};
  for (int64_t j = i; j < count; ++j) tail[j - i] = x[j];
  store_first(out + i, count - i, load_bf16(tail));
}

void add(float* x, const float* y, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(x + i, add(load(x + i), load(y + i)));
  if (i < count) store_first(x + i, count - i, add(load_first(x + i, count - i), load_first(y + i, count - i)));
}

// Four chains by vector index modulo 4, then one tree: a function of `count` alone.
TANDEM_INLINE float sum_of_squares(const float* x, int64_t count) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Vec value = load(x + i + c * kLanes);
      sums[c] = fma(value, value, sums[c]);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const int64_t left = count - (i + c * kLanes);
    if (left <= 0) break;
    const Vec value = load_first(x + i + c * kLanes, left < kLanes ? left : kLanes);
    sums[c] = fma(value, value, sums[c]);
  }
  return sum_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out) {
  const float mean = sum_of_squares(x, count) / static_cast<float>(count);
  const Vec inverse = div(broadcast(1.0F), sqrt(broadcast(mean + eps)));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, mul(mul(load(x + i), inverse), load(weight + i)));
  if (i == count) return;
  const int64_t left = count - i;
  store_first(out + i, left, mul(mul(load_first(x + i, left), inverse), load_first(weight + i, left)));
}

void silu_mul(const float* gate, const float* up, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, mul(silu(load(gate + i)), load(up + i)));
  if (i == count) return;
  const int64_t left = count - i;
  store_first(out + i, left, mul(silu(load_first(gate + i, left)), load_first(up + i, left)));
}

void sigmoid(const float* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, sigmoid(load(x + i)));
  if (i < count) store_first(out + i, count - i, sigmoid(load_first(x + i, count - i)));
}

// `count` values, minus infinity in the lanes behind them.
TANDEM_INLINE Vec load_or_lowest(const float* x, int64_t count) {
  if (count >= kLanes) return load(x);
  return keep_first(load_first(x, count), count, broadcast(-__builtin_inff()));
}

TANDEM_INLINE float largest_of(const float* x, int64_t count) {
  Vec largest = broadcast(-__builtin_inff());
  for (int64_t i = 0; i < count; i += kLanes) largest = max(largest, load_or_lowest(x + i, count - i));
  return max_lanes(largest);
}

void softmax(const float* x, int64_t count, float* out) {
  const Vec largest = broadcast(largest_of(x, count));
  Vec sums = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec weight = exp(sub(load_or_lowest(x + i, count - i), largest));
    store_first(out + i, count - i < kLanes ? count - i : kLanes, weight);
    sums = add(sums, weight);
  }
  const Vec sum = broadcast(sum_lanes(sums));
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    store_first(out + i, left, div(load_first(out + i, left), sum));
  }
}

void rotate_halves(float* a, float* b, const float* cosine, const float* sine, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    const Vec x = load_first(a + i, left);
    const Vec y = load_first(b + i, left);
    const Vec c = load_first(cosine + i, left);
    const Vec s = load_first(sine + i, left);
    store_first(a + i, left, sub(mul(x, c), mul(y, s)));
    store_first(b + i, left, add(mul(y, c), mul(x, s)));
  }
}

void rotate_pairs(float* x, const float* cosine, const float* sine, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float a = x[2 * i];
    const float b = x[2 * i + 1];
    x[2 * i] = a * cosine[i] - b * sine[i];
    x[2 * i + 1] = b * cosine[i] + a * sine[i];
  }
}

void weighted_sum(const float* terms, int64_t stride, const float* weights, int64_t num_terms, int64_t count,
                  float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    Vec sum = zero();
    for (int64_t j = 0; j < num_terms; ++j) {
      sum = fma(broadcast(weights[j]), load_first(terms + j * stride + i, left), sum);
    }
    store_first(out + i, left, sum);
  }
}

}  // namespace
}  // namespace tandem::kernels::cpu
