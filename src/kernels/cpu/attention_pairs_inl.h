// The two products of attention on bf16 pairs. Included by isa_avx512_bf16.cc after attention_inl.h.
//
// A score is one chain over pairs of dimensions, a sum of values one chain over pairs of positions, each pair one
// instruction, whatever else is in the call.
#pragma once

#include <cstdint>

#include "src/kernels/cpu/isa.h"

namespace tandem::kernels::cpu {
namespace {

TANDEM_INLINE Vec load_pairs(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
// The first of each pair, and zero: the second may be anything.
TANDEM_INLINE Vec keep_first_of_pairs(Vec pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(0xFFFF)));
}

// The next step of a prefetch. In the order of addresses and evenly over the products, as many lines are under way as a
// core can have.
template <bool PREFETCH>
TANDEM_INLINE void prefetch_step(Prefetch* next) {
  if constexpr (PREFETCH) {
    if (next->piece == next->num_pieces) return;
    const std::byte* address = next->pieces[next->piece] + next->offset;
    for (int64_t line = 0; line < next->step_bytes; line += 64) _mm_prefetch(address + line, _MM_HINT_T1);
    next->offset += next->step_bytes;
    if (next->offset < next->piece_bytes) return;
    next->offset = 0;
    ++next->piece;
  }
}

constexpr int score_slabs(int queries) { return queries <= 4 ? 4 : 2; }  // up to 16 sums
constexpr int pair_vectors(int queries) { return queries <= 2 ? 8 : queries <= 4 ? 4 : 2; }

// Spreads the prefetch over both products of a whole tile.
TANDEM_INLINE void plan_prefetch(Prefetch* next, int queries, int64_t pairs) {
  const int64_t steps = pairs * (kTileSlabs / score_slabs(queries)) +
                        (2 * pairs / kLanes + pair_vectors(queries) - 1) / pair_vectors(queries) * (kTile / 2);
  next->step_bytes = (next->num_pieces * next->piece_bytes / steps + 63) / 64 * 64;
}

template <int QUERIES, int SLABS>
TANDEM_INLINE void score_pair(const uint16_t* q, int64_t q_stride, int64_t d, const VecArray<SLABS>& key,
                              VecTable<QUERIES, SLABS>& sums) {
#pragma GCC unroll 8
  for (int i = 0; i < QUERIES; ++i) {
    const Vec query = broadcast_pair(q + i * q_stride + 2 * d);
#pragma GCC unroll 4
    for (int s = 0; s < SLABS; ++s) sums[i][s] = dot_pairs(sums[i][s], query, key[s]);
  }
}

// Adds the products of pairs [begin, end) of dimensions to the scores of SLABS slabs.
template <int QUERIES, int SLABS, bool F8, bool PREFETCH>
TANDEM_INLINE void score_pair_dims(const uint16_t* q, int64_t q_stride, const PairTile& tile, int64_t slab,
                                   int64_t begin, int64_t end, VecTable<QUERIES, SLABS>& sums) {
  VecArray<SLABS> key;
  if constexpr (F8) {
    for (int64_t d = begin; d < end; d += 2) {
      prefetch_step<PREFETCH>(tile.next);
      VecArray<SLABS> second;
#pragma GCC unroll 4
      for (int s = 0; s < SLABS; ++s) widen_f8(tile.f8_keys[slab + s] + d * 2 * kSlab, &key[s], &second[s]);
      score_pair<QUERIES, SLABS>(q, q_stride, d, key, sums);
      prefetch_step<PREFETCH>(tile.next);
      score_pair<QUERIES, SLABS>(q, q_stride, d + 1, second, sums);
    }
    return;
  }
  const uint16_t* keys[static_cast<size_t>(SLABS)];
#pragma GCC unroll 4
  for (int s = 0; s < SLABS; ++s) keys[s] = tile.keys[slab + s];
  const int64_t stride = tile.key_stride;
  for (int64_t d = begin; d < end; ++d) {
    prefetch_step<PREFETCH>(tile.next);
#pragma GCC unroll 4
    for (int s = 0; s < SLABS; ++s) key[s] = load_pairs(keys[s] + d * stride);
    score_pair<QUERIES, SLABS>(q, q_stride, d, key, sums);
  }
}

template <int QUERIES, int SLABS, bool F8, bool PREFETCH>
TANDEM_INLINE void score_pairs_block(const uint16_t* q, int64_t q_stride, const PairTile& tile, int64_t slab,
                                     int64_t pairs, float* out) {
  VecTable<QUERIES, SLABS> sums;
#pragma GCC unroll 8
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 4
    for (int s = 0; s < SLABS; ++s) sums[i][s] = zero();
  }
  int64_t done = 0;
  if (tile.key_scales.factors != nullptr) {
    done = tile.key_scales.dims / 2;
    score_pair_dims<QUERIES, SLABS, F8, PREFETCH>(q, q_stride, tile, slab, 0, done, sums);
#pragma GCC unroll 4
    for (int s = 0; s < SLABS; ++s) {
      const Vec factors = load(tile.key_scales.factors + (slab + s) * kSlab);
#pragma GCC unroll 8
      for (int i = 0; i < QUERIES; ++i) sums[i][s] = mul(sums[i][s], factors);
    }
  }
  score_pair_dims<QUERIES, SLABS, F8, PREFETCH>(q, q_stride, tile, slab, done, pairs, sums);
#pragma GCC unroll 8
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 4
    for (int s = 0; s < SLABS; ++s) store(out + i * kTile + (slab + s) * kSlab, sums[i][s]);
  }
}

// Calls body(is_f8, prefetches), both as constants.
template <typename Body>
TANDEM_INLINE void with_kind_of(const PairTile& tile, const Body& body) {
  const bool is_f8 = tile.f8_keys[0] != nullptr;
  if (tile.next != nullptr) {
    is_f8 ? body(std::true_type(), std::true_type()) : body(std::false_type(), std::true_type());
  } else {
    is_f8 ? body(std::true_type(), std::false_type()) : body(std::false_type(), std::false_type());
  }
}

void score_pairs(const uint16_t* q, int64_t q_stride, int64_t queries, const PairTile& tile, int64_t positions,
                 int64_t pairs, float* out) {
  with_count<8>(queries, [&](auto count) TANDEM_INLINE_LAMBDA {
    constexpr int kQueries = decltype(count)::value;
    constexpr int kSlabs = score_slabs(kQueries);
    if (tile.next != nullptr) plan_prefetch(tile.next, kQueries, pairs);
    with_kind_of(tile, [&](auto is_f8, auto prefetches) TANDEM_INLINE_LAMBDA {
      for (int64_t slab = 0; slab * kSlab < positions; slab += kSlabs) {
        score_pairs_block<kQueries, kSlabs, decltype(is_f8)::value, decltype(prefetches)::value>(q, q_stride, tile,
                                                                                                 slab, pairs, out);
      }
    });
  });
}

template <int QUERIES, int VECTORS, bool F8, bool PREFETCH>
TANDEM_INLINE void accumulate_pair_columns(const uint16_t* weights, const PairTile& tile, int64_t begin, int64_t end,
                                           int64_t column, float* acc, int64_t acc_stride) {
  VecTable<QUERIES, VECTORS> sums;
#pragma GCC unroll 8
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = load(acc + i * acc_stride + v * kLanes);
  }
  const auto add_pair = [&](int64_t position, auto take) TANDEM_INLINE_LAMBDA {
    prefetch_step<PREFETCH>(tile.next);
    const int64_t slab = position / kSlab;
    const int64_t pair = position % kSlab / 2;
    VecArray<VECTORS> value;
    if constexpr (F8) {
      const uint8_t* values = tile.f8_values[slab] + pair * tile.value_stride + 2 * column;
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v += 2) widen_f8(values + 2 * v * kLanes, &value[v], &value[v + 1]);
    } else {
      const uint16_t* values = tile.values[slab] + pair * tile.value_stride + 2 * column;
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) value[v] = load_pairs(values + 2 * v * kLanes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) value[v] = take(value[v]);
#pragma GCC unroll 8
    for (int i = 0; i < QUERIES; ++i) {
      const Vec weight = broadcast_pair(weights + i * kTile + position);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = dot_pairs(sums[i][v], weight, value[v]);
    }
  };
  int64_t position = begin;
  for (; position + 2 <= end; position += 2) add_pair(position, [](Vec x) TANDEM_INLINE_LAMBDA { return x; });
  if (position < end) add_pair(position, [](Vec x) TANDEM_INLINE_LAMBDA { return keep_first_of_pairs(x); });
#pragma GCC unroll 8
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(acc + i * acc_stride + v * kLanes, sums[i][v]);
  }
}

template <int QUERIES, bool F8, bool PREFETCH>
TANDEM_INLINE void accumulate_pair_queries(const uint16_t* weights, const PairTile& tile, int64_t begin, int64_t end,
                                           int64_t dim, float* acc, int64_t acc_stride) {
  constexpr int kVectors = pair_vectors(QUERIES);
  constexpr int kFew = F8 ? 2 : 1;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes) {
    accumulate_pair_columns<QUERIES, kVectors, F8, PREFETCH>(weights, tile, begin, end, d, acc + d, acc_stride);
  }
  for (; d < dim; d += kFew * kLanes) {
    accumulate_pair_columns<QUERIES, kFew, F8, PREFETCH>(weights, tile, begin, end, d, acc + d, acc_stride);
  }
}

void accumulate_pairs(const uint16_t* weights, int64_t queries, const PairTile& tile, int64_t begin, int64_t end,
                      int64_t dim, float* acc, int64_t acc_stride) {
  with_count<8>(queries, [&](auto count) TANDEM_INLINE_LAMBDA {
    with_kind_of(tile, [&](auto is_f8, auto prefetches) TANDEM_INLINE_LAMBDA {
      accumulate_pair_queries<decltype(count)::value, decltype(is_f8)::value, decltype(prefetches)::value>(
          weights, tile, begin, end, dim, acc, acc_stride);
    });
  });
}

void round_pairs(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    _mm256_mask_storeu_epi16(out + i, first_lanes(left), narrow(load_first(x + i, left)));
  }
}

void interleave(const uint16_t* a, const uint16_t* b, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i)));
    _mm512_storeu_si512(out + 2 * i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

}  // namespace
}  // namespace tandem::kernels::cpu
