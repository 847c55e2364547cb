// Products of integer rows with integer panels, for any vector width. Included by isa_*.cc after gemm_inl.h.
//
// Sums over a group of columns are integers, so the order inside a group is free; the groups' sums are taken into an
// f32 one after another. Hence a tile may have any shape, and every instruction set gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/kernels/cpu/isa.h"

namespace tandem::kernels::cpu {
namespace {

template <int N>
using IntVecs = IntVec[static_cast<size_t>(N)];
template <int ROWS, int N>
using IntGrid = IntVec[static_cast<size_t>(ROWS)][static_cast<size_t>(N)];

// Some rows and panels of a block. `first_column` is the first panel's first output.
struct IntegerPass {
  const std::byte* const* x = nullptr;
  float* const* out = nullptr;
  const std::byte* panels = nullptr;
  int64_t panel_bytes = 0;
  int64_t first_column = 0;
  int64_t cols = 0;
  const IntegerLayout* layout = nullptr;
  // Fetched into the second cache on the way, prefetch_step bytes for every step of the panels; null: nothing.
  const std::byte* prefetch = nullptr;
  int64_t prefetch_step = 0;
};

constexpr int64_t kStepBytes = kPanelWidth * 4;  // of a panel: four columns of 8 bits, or eight of 4

TANDEM_INLINE IntVec broadcast_codes(const std::byte* p) {
  int32_t codes;
  __builtin_memcpy(&codes, p, sizeof(codes));
  return int_broadcast(codes);
}

// One row of 8-bit activations has registers left for sums of their own for high nibbles, which then need not be
// shifted down one by one: sums[1] is 16 times too large.
template <int BITS, int PLANES, int ROWS>
constexpr bool kSumsHighNibbles = kDotsAnyByte&& BITS == 4 && PLANES == 1 && ROWS == 1;

// The next group of panels, as far as a step of VECTORS vectors of this one goes.
template <int VECTORS>
TANDEM_INLINE void prefetch_lines(const std::byte* ahead) {
#pragma GCC unroll 9
  for (int line = 0; line <= VECTORS; ++line) __builtin_prefetch(ahead + line * 64, 0, 2);
}

// sums[0][v] += the products of low nibbles of columns [begin, end), sums[1][v] += 16 times those of high ones.
template <int VECTORS>
TANDEM_INLINE void add_nibble_products(const IntegerPass& pass, const std::byte* const* panels, int64_t begin,
                                       int64_t end, IntGrid<1, VECTORS>* sums) {
  const NibbleMasks masks;
  for (int64_t k = begin; k < end; k += 8) {
    const int64_t offset = k / 8 * kStepBytes;
    prefetch_lines<VECTORS>(pass.prefetch + k / 8 * pass.prefetch_step);
    const IntVec low = broadcast_codes(pass.x[0] + k);
    const IntVec high = broadcast_codes(pass.x[0] + k + 4);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const std::byte* codes = panels[v / kPanelVectors] + offset + v % kPanelVectors * kLanes * 4;
      sums[0][0][v] = dot_nibbles(sums[0][0][v], load_masked(codes, masks.low), low);
      sums[1][0][v] = dot_nibbles(sums[1][0][v], load_masked(codes, masks.high), high);
    }
  }
}

// sums[plane][r][v] += the products of columns [begin, end).
template <int BITS, int PLANES, int ROWS, int VECTORS>
TANDEM_INLINE void add_products(const IntegerPass& pass, const std::byte* const* panels, int64_t begin, int64_t end,
                                IntGrid<ROWS, VECTORS>* sums) {
  const int64_t padded = pass.layout->padded;
  constexpr int64_t kColumns = BITS == 8 ? 4 : 8;
  constexpr int64_t kVectorBytes = kLanes * 4;
  for (int64_t k = begin; k < end; k += kColumns) {
    const int64_t offset = k / kColumns * kStepBytes;
    const std::byte* ahead = pass.prefetch + k / kColumns * pass.prefetch_step;
    if constexpr (ROWS <= 2 && BITS == 4) {
      // Unpacking leaves room for few loads in the core's window. Codes of 8 bits need no help and would be slowed
      // down.
      prefetch_lines<VECTORS>(ahead);
    } else if constexpr (ROWS > 2) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + pass.prefetch_step / 2, 0, 2);
    }
    IntVecs<VECTORS> codes;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      codes[v] = int_load(panels[v / kPanelVectors] + offset + v % kPanelVectors * kVectorBytes);
    }
    if constexpr (BITS == 8) {
      ByteCodes split[static_cast<size_t>(VECTORS)];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) split[v] = split_bytes(codes[v]);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int plane = 0; plane < PLANES; ++plane) {
          const IntVec x = broadcast_codes(pass.x[r] + plane * padded + k);
#pragma GCC unroll 8
          for (int v = 0; v < VECTORS; ++v) sums[plane][r][v] = dot_bytes(sums[plane][r][v], split[v], x);
        }
      }
    } else {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        IntVecs<VECTORS> nibbles;
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) nibbles[v] = half == 0 ? low_nibbles(codes[v]) : high_nibbles(codes[v]);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
          for (int plane = 0; plane < PLANES; ++plane) {
            const IntVec x = broadcast_codes(pass.x[r] + plane * padded + k + 4 * half);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sums[plane][r][v] = dot_nibbles(sums[plane][r][v], nibbles[v], x);
          }
        }
      }
    }
  }
}

// totals[r][v] += scales * (sums less the zeros' share) of group g.
template <int BITS, int PLANES, int ROWS, int VECTORS>
TANDEM_INLINE void take_group(const IntegerPass& pass, const std::byte* const* panels, int64_t g,
                              const IntGrid<ROWS, VECTORS>* sums, Vecs<VECTORS>* totals) {
  const IntegerLayout& layout = *pass.layout;
  constexpr int32_t kMiddle = BITS == 8 ? 128 : 8;
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) {
    const std::byte* panel = panels[v / kPanelVectors];
    const int64_t lane = g * kPanelWidth + v % kPanelVectors * kLanes;
    const std::byte* scales = panel + layout.panel_scales();
    const Vec scale = layout.f16_scales ? load_f16(reinterpret_cast<const uint16_t*>(scales) + lane)
                                        : load(reinterpret_cast<const float*>(scales) + lane);
    IntVec zeros = int_broadcast(kMiddle);
    if (layout.own_zeros) zeros = load_bytes(panel + layout.panel_zeros() + lane);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const float* x_scales = reinterpret_cast<const float*>(pass.x[r] + layout.row_scales());
      const int32_t* x_sums = reinterpret_cast<const int32_t*>(pass.x[r] + layout.row_sums());
      Vec value = to_float(
          int_sub(sums[PLANES - 1][r][v], int_mul(zeros, int_broadcast(x_sums[(PLANES - 1) * layout.groups + g]))));
      if constexpr (PLANES == 2) {
        const Vec high = to_float(int_sub(sums[0][r][v], int_mul(zeros, int_broadcast(x_sums[g]))));
        value = fma(broadcast(256.0F), high, value);
      }
      totals[r][v] = fma(value, mul(broadcast(x_scales[g]), scale), totals[r][v]);
    }
  }
}

template <int BITS, int PLANES, int ROWS, int PANELS>
__attribute__((noinline)) void multiply_integer_tile(const IntegerPass& pass) {
  constexpr int kVectors = PANELS * kPanelVectors;
  constexpr bool kHighNibbles = kSumsHighNibbles<BITS, PLANES, ROWS>;
  constexpr int kSums = kHighNibbles ? 2 : PLANES;
  const IntegerLayout& layout = *pass.layout;
  Array<const std::byte*, PANELS> panels;
  for (int p = 0; p < PANELS; ++p) panels[p] = pass.panels + p * pass.panel_bytes;
  VecGrid<ROWS, kVectors> totals;
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) totals[r][v] = zero();
  }
  for (int64_t g = 0; g < layout.groups; ++g) {
    IntGrid<ROWS, kVectors> sums[static_cast<size_t>(kSums)];
#pragma GCC unroll 2
    for (int sum = 0; sum < kSums; ++sum) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[sum][r][v] = int_zero();
      }
    }
    const int64_t begin = g * layout.group;
    const int64_t end = g + 1 == layout.groups ? layout.padded : begin + layout.group;
    if constexpr (kHighNibbles) {
      add_nibble_products<kVectors>(pass, panels, begin, end, sums);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[0][0][v] = int_add(sums[0][0][v], int_shift_right_4(sums[1][0][v]));
    } else {
      add_products<BITS, PLANES, ROWS, kVectors>(pass, panels, begin, end, sums);
    }
    take_group<BITS, PLANES, ROWS, kVectors>(pass, panels, g, sums, totals);
  }
  const int64_t cols = pass.cols - pass.first_column;
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    float* out = pass.out[r] + pass.first_column;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = cols - v * kLanes;
      if (left >= kLanes) {
        store(out + v * kLanes, totals[r][v]);
      } else if (left > 0) {
        store_first(out + v * kLanes, left, totals[r][v]);
      }
    }
  }
}

template <int BITS, int PLANES, int ROWS, int PANELS>
TANDEM_INLINE void multiply_integer_rows(int64_t rows, const IntegerPass& pass) {
  if constexpr (ROWS >= 1) {
    if (rows == ROWS) return multiply_integer_tile<BITS, PLANES, ROWS, PANELS>(pass);
    multiply_integer_rows<BITS, PLANES, ROWS - 1, PANELS>(rows, pass);
  }
}

// Groups of panels one after another; each is taken over all rows while it is in the cache.
template <int BITS, int PLANES, int MAX_ROWS>
TANDEM_INLINE void multiply_integers(const GemmBlock& block) {
  constexpr int kPanels = integer_panels(MAX_ROWS);
  const int64_t panels = (block.cols + kPanelWidth - 1) / kPanelWidth;
  const int64_t row_blocks = (block.rows + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t p = 0; p < panels;) {
    const int64_t group = p + kPanels <= panels ? kPanels : 1;
    IntegerPass pass;
    pass.panels = block.panels + p * block.panel_bytes;
    pass.panel_bytes = block.panel_bytes;
    pass.first_column = p * kPanelWidth;
    pass.cols = block.cols;
    pass.layout = block.integers;
    // The next group's share of each block of rows: memory is read while this group is computed.
    const int64_t share = kPanels * block.panel_bytes / row_blocks;
    pass.prefetch_step = share * kStepBytes / (kPanelWidth * BITS / 8) / block.integers->padded / 8 * 8;
    for (int64_t b = 0; b < row_blocks; ++b) {
      const int64_t row = b * block.rows / row_blocks;
      const int64_t rows = (b + 1) * block.rows / row_blocks - row;
      pass.x = reinterpret_cast<const std::byte* const*>(block.x) + row;
      pass.out = block.out + row;
      pass.prefetch = pass.panels + group * block.panel_bytes + b * share;
      if (group == kPanels) {
        multiply_integer_rows<BITS, PLANES, MAX_ROWS, kPanels>(rows, pass);
      } else {
        multiply_integer_rows<BITS, PLANES, MAX_ROWS, 1>(rows, pass);
      }
    }
    p += group;
  }
}

template <int BITS, int PLANES>
void gemm_integers(const GemmBlock& block) {
  if (block.rows <= 2) return multiply_integers<BITS, PLANES, 2>(block);
  multiply_integers<BITS, PLANES, kIntegerRows / PLANES>(block);
}

}  // namespace
}  // namespace tandem::kernels::cpu
