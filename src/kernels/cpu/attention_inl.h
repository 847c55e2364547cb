// The inner parts of attention, for any vector width. Included by isa_*.cc after gemm_inl.h.
#pragma once

#include <cstdint>

#include "src/kernels/cpu/isa.h"

namespace tandem::kernels::cpu {
namespace {

// Lanes run over d, so that keys are read as they lie in the cache; a score is kLanes chains and one tree.
TANDEM_INLINE void score_block(const float* q, int64_t q_stride, const float* keys, int64_t key_stride, int64_t dim,
                               float* out) {
  Vec sums[kQueryBlock][kScoreKeys];
#pragma GCC unroll 4
  for (int i = 0; i < kQueryBlock; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kScoreKeys; ++j) sums[i][j] = zero();
  }
  for (int64_t d = 0; d < dim; d += kLanes) {
    Vec key[kScoreKeys];
#pragma GCC unroll 4
    for (int j = 0; j < kScoreKeys; ++j) key[j] = load(keys + j * key_stride + d);
#pragma GCC unroll 4
    for (int i = 0; i < kQueryBlock; ++i) {
      const Vec query = load(q + i * q_stride + d);
#pragma GCC unroll 4
      for (int j = 0; j < kScoreKeys; ++j) sums[i][j] = fma(query, key[j], sums[i][j]);
    }
  }
  if constexpr (kScoreKeys == 4) {
#pragma GCC unroll 4
    for (int i = 0; i < kQueryBlock; ++i) {
      sum_lanes(sums[i][0], sums[i][1], sums[i][kScoreKeys - 2], sums[i][kScoreKeys - 1], out + i * kTile);
    }
  } else {
    static_assert(kScoreKeys == 2 || kScoreKeys == 4);
#pragma GCC unroll 2
    for (int i = 0; i < kQueryBlock; i += 2) {
      float four[4];
      sum_lanes(sums[i][0], sums[i][1], sums[i + 1][0], sums[i + 1][1], four);
      out[i * kTile] = four[0];
      out[i * kTile + 1] = four[1];
      out[(i + 1) * kTile] = four[2];
      out[(i + 1) * kTile + 1] = four[3];
    }
  }
}

void scores(const float* q, int64_t q_stride, int64_t queries, const float* keys, int64_t key_stride, int64_t positions,
            int64_t dim, float* out) {
  for (int64_t i = 0; i < queries; i += kQueryBlock) {
    for (int64_t j = 0; j < positions; j += kScoreKeys) {
      score_block(q + i * q_stride, q_stride, keys + j * key_stride, key_stride, dim, out + i * kTile + j);
    }
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
