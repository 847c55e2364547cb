// The inner parts of attention, for any vector width. Included by isa_*.cc after gemm_inl.h.
#pragma once

#include <cstdint>

#include "src/kernels/cpu/isa.h"

namespace tandem::kernels::cpu {
namespace {

// Scores of kQueryBlock queries and KEYS keys. Lanes run over d, so that keys are read as they lie in the cache; a
// score is kLanes chains and one tree, whatever KEYS.
template <int KEYS>
TANDEM_INLINE void score_block(const float* q, int64_t q_stride, const float* keys, int64_t key_stride, int64_t dim,
                               float* out) {
  VecGrid<KEYS, kQueryBlock> sums;
#pragma GCC unroll 4
  for (int j = 0; j < KEYS; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kQueryBlock; ++i) sums[j][i] = zero();
  }
  for (int64_t d = 0; d < dim; d += kLanes) {
    Vecs<KEYS> key;
#pragma GCC unroll 4
    for (int j = 0; j < KEYS; ++j) key[j] = load(keys + j * key_stride + d);
#pragma GCC unroll 4
    for (int i = 0; i < kQueryBlock; ++i) {
      const Vec query = load(q + i * q_stride + d);
#pragma GCC unroll 4
      for (int j = 0; j < KEYS; ++j) sums[j][i] = fma(query, key[j], sums[j][i]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < KEYS; ++j) {
    const __m128 four = sum_lanes(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
    _mm_store_ss(out + j, four);
    _mm_store_ss(out + kTile + j, _mm_shuffle_ps(four, four, 1));
    _mm_store_ss(out + 2 * kTile + j, _mm_shuffle_ps(four, four, 2));
    _mm_store_ss(out + 3 * kTile + j, _mm_shuffle_ps(four, four, 3));
  }
}

// The same scores for one query: more keys at once instead.
template <int KEYS>
TANDEM_INLINE void score_single(const float* q, const float* keys, int64_t key_stride, int64_t dim, float* out) {
  static_assert(KEYS % 4 == 0);
  Vecs<KEYS> sums;
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j) sums[j] = zero();
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Vec query = load(q + d);
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) sums[j] = fma(query, load(keys + j * key_stride + d), sums[j]);
  }
#pragma GCC unroll 2
  for (int j = 0; j < KEYS; j += 4) {
    _mm_storeu_ps(out + j, sum_lanes(sums[j], sums[j + 1], sums[j + 2], sums[j + 3]));
  }
}

void scores(const float* q, int64_t q_stride, int64_t queries, const float* keys, int64_t key_stride, int64_t positions,
            int64_t dim, float* out) {
  static_assert(kQueryBlock == 4);
  for (int64_t i = 0; i < queries; i += kQueryBlock) {
    const float* query = q + i * q_stride;
    float* row = out + i * kTile;
    int64_t j = 0;
    if (queries - i == 1) {
      for (; j + 8 <= positions; j += 8) score_single<8>(query, keys + j * key_stride, key_stride, dim, row + j);
    }
    for (; j + kScoreKeys <= positions; j += kScoreKeys) {
      score_block<kScoreKeys>(query, q_stride, keys + j * key_stride, key_stride, dim, row + j);
    }
    for (; j < positions; ++j) score_block<1>(query, q_stride, keys + j * key_stride, key_stride, dim, row + j);
  }
}

void softmax_tile(float* scores, int64_t visible, float scale, SoftmaxState* state, float* acc, int64_t dim) {
  const Vec factor = broadcast(scale);
  Vec largest_lanes = broadcast(-__builtin_inff());
  for (int64_t j = 0; j < visible; j += kLanes) {
    Vec score = mul(load(scores + j), factor);
    if (visible - j < kLanes) score = keep_first(score, visible - j, broadcast(-__builtin_inff()));
    store(scores + j, score);
    largest_lanes = max(largest_lanes, score);
  }
  const float tile_largest = max_lanes(largest_lanes);
  const float largest = tile_largest > state->largest ? tile_largest : state->largest;
  Vec sums = zero();
  for (int64_t j = 0; j < visible; j += kLanes) {
    const Vec weight = exp(sub(load(scores + j), broadcast(largest)));
    store(scores + j, weight);
    sums = add(sums, weight);
  }
  if (largest != state->largest) {  // otherwise the factor is exactly 1
    const float shrink = exp(state->largest - largest);
    state->sum *= shrink;
    for (int64_t d = 0; d < dim; d += kLanes) store(acc + d, mul(load(acc + d), broadcast(shrink)));
  }
  state->largest = largest;
  state->sum += sum_lanes(sums);
}

template <int QUERIES, int VECTORS>
TANDEM_INLINE void accumulate_columns(const float* weights, const float* values, int64_t value_stride, int64_t begin,
                                      int64_t end, float* acc, int64_t acc_stride) {
  VecGrid<QUERIES, VECTORS> sums;
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = load(acc + i * acc_stride + v * kLanes);
  }
  for (int64_t j = begin; j < end; ++j) {
    Vecs<VECTORS> value;
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
    const float* w = weights + i * kTile;
    float* a = acc + i * acc_stride;
    switch (queries - i) {
      case 1:
        accumulate_queries<1>(w, values, value_stride, begin, end, dim, a, acc_stride);
        break;
      case 2:
        accumulate_queries<2>(w, values, value_stride, begin, end, dim, a, acc_stride);
        break;
      case 3:
        accumulate_queries<3>(w, values, value_stride, begin, end, dim, a, acc_stride);
        break;
      default:
        accumulate_queries<4>(w, values, value_stride, begin, end, dim, a, acc_stride);
        break;
    }
  }
}

void fold(SoftmaxState* total, float* total_acc, const SoftmaxState* part, const float* part_acc, int64_t dim) {
  const float largest = part->largest > total->largest ? part->largest : total->largest;
  const float shrink_total = exp(total->largest - largest);
  const float shrink_part = exp(part->largest - largest);
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
