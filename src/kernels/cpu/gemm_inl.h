// Matrix products on packed panels, for any vector width. Included by isa_*.cc after its simd_*.h.
//
// Each output is ONE chain of multiply-adds over k, from the first element to the last: a tile keeps its sums in
// registers, and where k is cut into passes the sums wait in `out` as the f32 they are. So the shape of a tile, which
// follows from the number of rows, can be chosen for speed alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "src/kernels/cpu/isa.h"

namespace tandem::kernels::cpu {
namespace {

template <typename T, int N>
using Array = T[static_cast<size_t>(N)];
template <int N>
using Vecs = Vec[static_cast<size_t>(N)];
template <int ROWS, int N>
using VecGrid = Vec[static_cast<size_t>(ROWS)][static_cast<size_t>(N)];

constexpr int kPanelVectors = static_cast<int>(kPanelWidth / kLanes);

// sums[r][v] += x[r][k] * weights[v].
template <int ROWS, int VECTORS>
TANDEM_INLINE void multiply_add(const float* const* x, int64_t k, const Vec* weights, Vecs<VECTORS>* sums) {
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    const Vec value = broadcast(x[r][k]);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(value, weights[v], sums[r][v]);
  }
}

// Weights and x in f32: [k][kPanelWidth].
struct F32Product {
  using X = float;
  static constexpr int kMaxRows = kGemmRows;
  static constexpr int64_t kBytesPerK = kPanelWidth * 4;

  template <int ROWS, int VECTORS>
  TANDEM_INLINE static void accumulate(const X* const* x, int64_t k, const std::byte* const* panels,
                                       Vecs<VECTORS>* sums) {
    for (int64_t i = 0; i < k; ++i) {
      Vecs<VECTORS> weights;
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const float* panel = reinterpret_cast<const float*>(panels[v / kPanelVectors]);
        weights[v] = load(panel + i * kPanelWidth + (v % kPanelVectors) * kLanes);
      }
      multiply_add<ROWS, VECTORS>(x, i, weights, sums);
    }
  }
};

// Weights in bf16 pairs, widened on the way; x in f32.
struct Bf16Product {
  using X = float;
  static constexpr int kMaxRows = kPairRows;
  static constexpr int64_t kBytesPerK = kPanelWidth * 2;

  template <int ROWS, int VECTORS>
  TANDEM_INLINE static void accumulate(const X* const* x, int64_t k, const std::byte* const* panels,
                                       Vecs<VECTORS>* sums) {
    const int64_t pairs = k / 2;
    for (int64_t i = 0; i < pairs; ++i) accumulate_pair<ROWS, VECTORS, true>(x, i, panels, sums);
    if (k % 2 != 0) accumulate_pair<ROWS, VECTORS, false>(x, pairs, panels, sums);
  }

 private:
  template <int ROWS, int VECTORS, bool BOTH>
  TANDEM_INLINE static void accumulate_pair(const X* const* x, int64_t pair, const std::byte* const* panels,
                                            Vecs<VECTORS>* sums) {
    Vecs<VECTORS> weights;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) weights[v] = load_first_of_pairs(pairs_at(panels, pair, v));
    multiply_add<ROWS, VECTORS>(x, 2 * pair, weights, sums);
    if constexpr (BOTH) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        // Read again from L1: kept from above, the pairs would take the registers that the sums need.
        const uint16_t* again = pairs_at(panels, pair, v);
        asm("" : "+r"(again));
        weights[v] = load_second_of_pairs(again);
      }
      multiply_add<ROWS, VECTORS>(x, 2 * pair + 1, weights, sums);
    }
  }

  TANDEM_INLINE static const uint16_t* pairs_at(const std::byte* const* panels, int64_t pair, int vector) {
    const uint16_t* panel = reinterpret_cast<const uint16_t*>(panels[vector / kPanelVectors]);
    return panel + (pair * kPanelWidth + (vector % kPanelVectors) * kLanes) * 2;
  }
};

#ifdef TANDEM_DOT_PAIRS
// Weights and x in bf16 pairs, multiplied and added by one instruction per pair.
struct Bf16DotProduct {
  using X = uint16_t;
  static constexpr int kMaxRows = kGemmRows;
  static constexpr int64_t kBytesPerK = kPanelWidth * 2;

  template <int ROWS, int VECTORS>
  TANDEM_INLINE static void accumulate(const X* const* x, int64_t k, const std::byte* const* panels,
                                       Vecs<VECTORS>* sums) {
    const int64_t pairs = (k + 1) / 2;
    for (int64_t i = 0; i < pairs; ++i) {
      Vecs<VECTORS> weights;
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const uint16_t* panel = reinterpret_cast<const uint16_t*>(panels[v / kPanelVectors]);
        weights[v] = load(reinterpret_cast<const float*>(panel + (i * kPanelWidth + (v % kPanelVectors) * kLanes) * 2));
      }
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const Vec pair = broadcast_pair(x[r] + 2 * i);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = dot_pairs(sums[r][v], pair, weights[v]);
      }
    }
  }
};
#endif

// One pass over k for some rows and panels. `first_column` is the first panel's first output.
struct Pass {
  const void* const* x = nullptr;  // row pointers, before `k_begin` is added
  float* const* out = nullptr;
  int64_t k_begin = 0;
  int64_t k_end = 0;
  const std::byte* panels = nullptr;  // at k_begin
  int64_t panel_bytes = 0;
  int64_t first_column = 0;
  int64_t cols = 0;
};

template <typename Product, int ROWS, int PANELS>
__attribute__((noinline)) void multiply_tile(const Pass& pass) {
  constexpr int kVectors = PANELS * kPanelVectors;
  using X = typename Product::X;
  Array<const X*, ROWS> x;
  Array<float*, ROWS> out;
  for (int r = 0; r < ROWS; ++r) {
    x[r] = static_cast<const X*>(pass.x[r]) + pass.k_begin;
    out[r] = pass.out[r] + pass.first_column;
  }
  Array<const std::byte*, PANELS> panels;
  for (int p = 0; p < PANELS; ++p) panels[p] = pass.panels + p * pass.panel_bytes;
  const int64_t cols = pass.cols - pass.first_column;

  VecGrid<ROWS, kVectors> sums;
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = cols - v * kLanes;
      sums[r][v] = zero();
      if (pass.k_begin == 0 || left <= 0) continue;
      sums[r][v] = left >= kLanes ? load(out[r] + v * kLanes) : load_first(out[r] + v * kLanes, left);
    }
  }
  Product::template accumulate<ROWS, kVectors>(x, pass.k_end - pass.k_begin, panels, sums);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = cols - v * kLanes;
      if (left >= kLanes) {
        store(out[r] + v * kLanes, sums[r][v]);
      } else if (left > 0) {
        store_first(out[r] + v * kLanes, left, sums[r][v]);
      }
    }
  }
}

// multiply_tile for a number of rows known at run time.
template <typename Product, int ROWS, int PANELS>
TANDEM_INLINE void multiply_rows(int64_t rows, const Pass& pass) {
  if constexpr (ROWS >= 1) {
    if (rows == ROWS) return multiply_tile<Product, ROWS, PANELS>(pass);
    multiply_rows<Product, ROWS - 1, PANELS>(rows, pass);
  }
}

// One group of panels times all rows. They are shared out evenly, so that no block of a single row is left over.
template <typename Product, int MAX_ROWS, int PANELS>
TANDEM_INLINE void multiply_row_blocks(const GemmBlock& block, int64_t row_blocks, int64_t group, Pass* pass) {
  for (int64_t b = 0; b < row_blocks; ++b) {
    const int64_t row = b * block.rows / row_blocks;
    const int64_t rows = (b + 1) * block.rows / row_blocks - row;
    pass->x = block.x + row;
    pass->out = block.out + row;
    if (group == PANELS) {
      multiply_rows<Product, MAX_ROWS, PANELS>(rows, *pass);
    } else {
      multiply_rows<Product, MAX_ROWS, 1>(rows, *pass);
    }
  }
}

// Few rows: each panel is taken from memory once, straight through, several side by side.
template <typename Product, int MAX_ROWS>
TANDEM_INLINE void multiply_narrow(const GemmBlock& block) {
  constexpr int kPanels = gemm_panels(MAX_ROWS);
  const int64_t panels = (block.cols + kPanelWidth - 1) / kPanelWidth;
  const int64_t row_blocks = (block.rows + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t p = 0; p < panels;) {
    const int64_t group = p + kPanels <= panels ? kPanels : 1;
    Pass pass{block.x,           block.out,       0,         block.k, block.panels + p * block.panel_bytes,
              block.panel_bytes, p * kPanelWidth, block.cols};
    multiply_row_blocks<Product, MAX_ROWS, kPanels>(block, row_blocks, group, &pass);
    p += group;
  }
}

template <typename Product>
TANDEM_INLINE void multiply_narrow(const GemmBlock& block) {
  if (block.rows == 1) return multiply_narrow<Product, 1>(block);
  if (block.rows == 2) return multiply_narrow<Product, 2>(block);
  multiply_narrow<Product, Product::kMaxRows>(block);
}

// Widens `k` columns of one bf16 panel to f32.
TANDEM_INLINE void widen_panel(const std::byte* panel, int64_t k, float* out) {
  const uint16_t* pairs = reinterpret_cast<const uint16_t*>(panel);
  for (int64_t i = 0; i < k; i += 2) {
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) {
      const uint16_t* source = pairs + i * kPanelWidth + 2 * v * kLanes;
      store(out + i * kPanelWidth + v * kLanes, load_first_of_pairs(source));
      store(out + (i + 1) * kPanelWidth + v * kLanes, load_second_of_pairs(source));
    }
  }
}

// Many rows: passes of kGemmDepth over k, so that a panel stays in L1 while all rows go over it. kWiden: bf16 panels
// are widened once per pass instead of once per tile.
template <typename Product, bool kWiden>
TANDEM_INLINE void multiply_wide(const GemmBlock& block) {
  using Inner = std::conditional_t<kWiden, F32Product, Product>;
  constexpr int kPanels = gemm_panels(Inner::kMaxRows);
  static_assert(!kWiden || kPanels * kGemmDepth * kPanelWidth <= kGemmScratch);
  const int64_t panels = (block.cols + kPanelWidth - 1) / kPanelWidth;
  const int64_t row_blocks = (block.rows + Inner::kMaxRows - 1) / Inner::kMaxRows;
  for (int64_t k = 0; k < block.k; k += kGemmDepth) {
    const int64_t k_end = block.k - k < kGemmDepth ? block.k : k + kGemmDepth;
    for (int64_t p = 0; p < panels;) {
      const int64_t group = p + kPanels <= panels ? kPanels : 1;
      const std::byte* source = block.panels + p * block.panel_bytes + k * Product::kBytesPerK;
      Pass pass{block.x, block.out, k, k_end, source, block.panel_bytes, p * kPanelWidth, block.cols};
      if constexpr (kWiden) {
        for (int64_t i = 0; i < group; ++i) {
          widen_panel(source + i * block.panel_bytes, k_end - k, block.scratch + i * kGemmDepth * kPanelWidth);
        }
        pass.panels = reinterpret_cast<const std::byte*>(block.scratch);
        pass.panel_bytes = kGemmDepth * kPanelWidth * int64_t{sizeof(float)};
      }
      multiply_row_blocks<Inner, Inner::kMaxRows, kPanels>(block, row_blocks, group, &pass);
      p += group;
    }
  }
}

template <typename Product, bool kWiden>
TANDEM_INLINE void multiply(const GemmBlock& block) {
  if (block.rows <= kWideRows) return multiply_narrow<Product>(block);
  multiply_wide<Product, kWiden>(block);
}

void gemm_f32(const GemmBlock& block) { multiply<F32Product, false>(block); }

void gemm_bf16_wide_input(const GemmBlock& block) { multiply<Bf16Product, kWidenPanels>(block); }

#ifdef TANDEM_DOT_PAIRS
void gemm_bf16(const GemmBlock& block) { multiply<Bf16DotProduct, false>(block); }
#else
void gemm_bf16(const GemmBlock& block) { gemm_bf16_wide_input(block); }
#endif

}  // namespace
}  // namespace tandem::kernels::cpu
