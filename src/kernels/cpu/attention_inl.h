// The inner parts of attention, for any vector width. Included by isa_*.cc after gemm_inl.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/kernels/cpu/isa.h"

#define TANDEM_INLINE_LAMBDA __attribute__((always_inline))

namespace tandem::kernels::cpu {
namespace {

template <int N>
using VecArray = Vec[static_cast<size_t>(N)];
template <int ROWS, int N>
using VecTable = Vec[static_cast<size_t>(ROWS)][static_cast<size_t>(N)];

// Calls body(std::integral_constant<int, count>), 1 <= count <= MAX.
template <int MAX, typename Body>
TANDEM_INLINE void with_count(int64_t count, const Body& body) {
  if constexpr (MAX > 1) {
    if (count < MAX) return with_count<MAX - 1>(count, body);
  }
  body(std::integral_constant<int, MAX>());
}

// 2^x: x = n + r with |r| <= 1/2, 2^r as e^(r ln 2) by its Taylor polynomial, 2^n by the exponent. 2^0 is exactly 1, a
// NaN stays one.
TANDEM_INLINE Vec exp2_precise(Vec x) {
  x = max(broadcast(-150.0F), x);
  const Vec n = round(x);
  const Vec r = mul(sub(x, n), broadcast(0.693147182F));
  Vec sum = broadcast(1.0F / 5040);  // the next term is below 6e-9
  sum = fma(sum, r, broadcast(1.0F / 720));
  sum = fma(sum, r, broadcast(1.0F / 120));
  sum = fma(sum, r, broadcast(1.0F / 24));
  sum = fma(sum, r, broadcast(1.0F / 6));
  sum = fma(sum, r, broadcast(1.0F / 2));
  sum = fma(sum, r, broadcast(1.0F));
  sum = fma(sum, r, broadcast(1.0F));
  return scale_by_power(sum, n);
}
TANDEM_INLINE float exp2_precise(float x) { return first(exp2_precise(broadcast(x))); }

#ifdef TANDEM_DOT_PAIRS
// For weights that become bf16: a polynomial through four points, 7e-6 off, a three-hundredth of their rounding.
TANDEM_INLINE Vec exp2_coarse(Vec x) {
  x = max(broadcast(-150.0F), x);
  const Vec n = round(x);
  const Vec r = sub(x, n);
  Vec sum = broadcast(9.65671029e-3F);
  sum = fma(sum, r, broadcast(5.58382829e-2F));
  sum = fma(sum, r, broadcast(2.40225301e-1F));
  sum = fma(sum, r, broadcast(6.93136734e-1F));
  sum = fma(sum, r, broadcast(1.0F));
  return scale_by_power_once(sum, n);
}
#endif

// Adds the products of dimensions [begin, end) to scores of QUERIES queries and VECTORS vectors of positions.
template <int QUERIES, int VECTORS>
TANDEM_INLINE void score_dims(const float* q, int64_t q_stride, const float* keys, int64_t begin, int64_t end,
                              VecTable<QUERIES, VECTORS>& sums) {
  for (int64_t d = begin; d < end; ++d) {
    VecArray<VECTORS> key;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) key[v] = load(keys + d * kTile + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < QUERIES; ++i) {
      const Vec query = broadcast(q[i * q_stride + d]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = fma(query, key[v], sums[i][v]);
    }
  }
}

// One chain over d for each score.
template <int QUERIES, int VECTORS>
TANDEM_INLINE void score_block(const float* q, int64_t q_stride, const float* keys, const KeyScales& scales,
                               int64_t position, int64_t dim, float* out) {
  VecTable<QUERIES, VECTORS> sums;
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = zero();
  }
  int64_t done = 0;
  if (scales.factors != nullptr) {
    done = scales.dims;
    score_dims<QUERIES, VECTORS>(q, q_stride, keys + position, 0, done, sums);
#pragma GCC unroll 4
    for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = mul(sums[i][v], load(scales.factors + position + v * kLanes));
    }
  }
  score_dims<QUERIES, VECTORS>(q, q_stride, keys + position, done, dim, sums);
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(out + i * kTile + position + v * kLanes, sums[i][v]);
  }
}

void scores(const float* q, int64_t q_stride, int64_t queries, const float* keys, const KeyScales& scales,
            int64_t positions, int64_t dim, float* out) {
  for (int64_t i = 0; i < queries; i += 4) {
    with_count<4>(queries - i, [&](auto count) TANDEM_INLINE_LAMBDA {
      constexpr int kQueries = decltype(count)::value;
      constexpr int kVectors = score_vectors(kQueries);
      for (int64_t j = 0; j < positions; j += kVectors * kLanes) {
        score_block<kQueries, kVectors>(q + i * q_stride, q_stride, keys, scales, j, dim, out + i * kTile);
      }
    });
  }
}

// `count` values, `other` in the lanes behind them.
TANDEM_INLINE Vec keep_visible(Vec x, int64_t count, float other) {
  return count >= kLanes ? x : keep_first(x, count, broadcast(other));
}

// The largest of ROWS rows of scores, scaled, and of their states so far.
template <int ROWS>
TANDEM_INLINE void find_largest(const SoftmaxTile& tile, int64_t first, float* largest) {
  VecArray<ROWS> lanes;
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) lanes[i] = broadcast(-__builtin_inff());
  for (int64_t j = 0; j < tile.visible; j += kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const float* scores = tile.scores + (first + i) * kTile + j;
      lanes[i] = max(lanes[i], keep_visible(load(scores), tile.visible - j, -__builtin_inff()));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
    const float tile_largest = max_lanes(lanes[i]) * tile.scale;
    const float before = tile.states[first + i].largest;
    largest[i] = tile_largest > before ? tile_largest : before;
  }
}

// Rows go through together only to overlap; each is computed as if it were alone.
template <int ROWS>
TANDEM_INLINE void softmax_rows(const SoftmaxTile& tile, int64_t first) {
  float largest[static_cast<size_t>(ROWS)];
  find_largest<ROWS>(tile, first, largest);
  const Vec factor = broadcast(tile.scale);
  VecArray<ROWS> sums;
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) sums[i] = zero();
  for (int64_t j = 0; j < tile.visible; j += kLanes) {
    const int64_t left = tile.visible - j;
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      float* scores = tile.scores + (first + i) * kTile + j;
      const Vec exponent = fma(load(scores), factor, broadcast(-largest[i]));
#ifdef TANDEM_DOT_PAIRS
      Vec weight = tile.narrow_weights != nullptr ? exp2_coarse(exponent) : exp2_precise(exponent);
#else
      Vec weight = exp2_precise(exponent);
#endif
      weight = keep_visible(weight, left, 0.0F);
      sums[i] = add(sums[i], weight);
      if (tile.value_scales != nullptr) weight = keep_visible(mul(weight, load(tile.value_scales + j)), left, 0.0F);
#ifdef TANDEM_DOT_PAIRS
      if (tile.narrow_weights != nullptr) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile.narrow_weights + (first + i) * kTile + j), narrow(weight));
        continue;
      }
#endif
      store(scores, weight);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
    SoftmaxState& state = tile.states[first + i];
    if (largest[i] != state.largest) {  // otherwise the factor is exactly 1
      const float shrink = exp2_precise(state.largest - largest[i]);
      float* acc = tile.acc + (first + i) * tile.dim;
      state.sum *= shrink;
      for (int64_t d = 0; d < tile.dim; d += kLanes) store(acc + d, mul(load(acc + d), broadcast(shrink)));
    }
    state.largest = largest[i];
    state.sum += sum_lanes(sums[i]);
  }
}

void softmax_tile(const SoftmaxTile& tile) {
  int64_t i = 0;
  for (; i + 4 <= tile.queries; i += 4) softmax_rows<4>(tile, i);
  for (; i < tile.queries; ++i) softmax_rows<1>(tile, i);
}

template <int QUERIES, int VECTORS>
TANDEM_INLINE void accumulate_columns(const float* weights, const float* values, int64_t value_stride, int64_t begin,
                                      int64_t end, float* acc, int64_t acc_stride) {
  VecTable<QUERIES, VECTORS> sums;
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = load(acc + i * acc_stride + v * kLanes);
  }
  for (int64_t j = begin; j < end; ++j) {
    VecArray<VECTORS> value;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) value[v] = load(values + j * value_stride + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < QUERIES; ++i) {
      const Vec weight = broadcast(weights[i * kTile + j]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = fma(weight, value[v], sums[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(acc + i * acc_stride + v * kLanes, sums[i][v]);
  }
}

template <int QUERIES>
TANDEM_INLINE void accumulate_queries(const float* weights, const float* values, int64_t value_stride, int64_t begin,
                                      int64_t end, int64_t dim, float* acc, int64_t acc_stride) {
  constexpr int kVectors = accumulate_vectors(QUERIES);
  constexpr int kFew = static_cast<int>(kPadding / kLanes);
  int64_t d = 0;
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes) {
    accumulate_columns<QUERIES, kVectors>(weights, values + d, value_stride, begin, end, acc + d, acc_stride);
  }
  for (; d < dim; d += kPadding) {
    accumulate_columns<QUERIES, kFew>(weights, values + d, value_stride, begin, end, acc + d, acc_stride);
  }
}

void accumulate(const float* weights, int64_t queries, const float* values, int64_t value_stride, int64_t begin,
                int64_t end, int64_t dim, float* acc, int64_t acc_stride) {
  for (int64_t i = 0; i < queries; i += 4) {
    with_count<4>(queries - i, [&](auto count) TANDEM_INLINE_LAMBDA {
      accumulate_queries<decltype(count)::value>(weights + i * kTile, values, value_stride, begin, end, dim,
                                                 acc + i * acc_stride, acc_stride);
    });
  }
}

void fold(SoftmaxState* total, float* total_acc, const SoftmaxState* part, const float* part_acc, int64_t dim) {
  const float largest = part->largest > total->largest ? part->largest : total->largest;
  const float shrink_total = exp2_precise(total->largest - largest);
  const float shrink_part = exp2_precise(part->largest - largest);
  total->largest = largest;
  total->sum = total->sum * shrink_total + part->sum * shrink_part;
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Vec kept = mul(load(total_acc + d), broadcast(shrink_total));
    store(total_acc + d, fma(load(part_acc + d), broadcast(shrink_part), kept));
  }
}

void finish(const SoftmaxState* state, const float* acc, int64_t count, float* out) {
  const Vec sum = broadcast(state->sum);
  for (int64_t d = 0; d < count; d += kLanes) {
    store_first(out + d, count - d < kLanes ? count - d : kLanes, div(load(acc + d), sum));
  }
}

}  // namespace
}  // namespace tandem::kernels::cpu
