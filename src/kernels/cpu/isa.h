// The table of what one instruction set does, single-threaded, on plain pointers. One file per instruction set
// (isa_*.cc) is compiled with its own flags and fills a table; everything above it (splitting, packing, tiles of
// positions) is compiled once for every machine. Only functions reached through a table may use its instructions.
//
// Every function gives the same bits for a row whatever else is in the call: sums over k run as one chain from the
// first element to the last, sums over lanes as one fixed tree, and tails use the same vector code as whole vectors.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tandem::kernels::cpu {

inline constexpr int64_t kPanelWidth = 16;   // outputs per packed panel: two AVX2 registers, one of AVX-512
inline constexpr int64_t kMaxGemmRows = 96;  // rows of one GemmBlock: with the k of one pass, in L2
inline constexpr int64_t kGemmScratch = 2 * 256 * kPanelWidth;  // floats: two panels of one pass, widened
inline constexpr int64_t kTile = 64;                            // positions per attention tile
inline constexpr int64_t kSlab = 16;                            // positions whose keys lie together
inline constexpr int64_t kTileSlabs = kTile / kSlab;
inline constexpr int64_t kQueryBlock = 8;   // query vectors that share one pass over a tile
inline constexpr int64_t kPadding = 16;     // attention vectors are padded with zeros to a multiple of this
inline constexpr int64_t kRowPadding = 32;  // those that `transpose` reads as bf16 pairs

inline constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// How the integer forms of a weight's panels and of activation rows lie in memory.
//  A row: its codes as int8 [planes][padded], one plane of 8-bit codes or two with the high and the low parts of 16-bit
//  codes; then f32 scales [groups]; then int32 sums of the codes [planes][groups].
//  A panel: its codes; then scales [groups][kPanelWidth], f32 or, with f16_scales, f16; then, with own_zeros, uint8
//  zeros [groups][kPanelWidth].
//  8-bit codes lie as [padded / 4][kPanelWidth][4]; 4-bit codes as bytes [padded / 8][kPanelWidth][4], byte b of column
//  8 i holding column 8 i + b in its low and 8 i + 4 + b in its high nibble.
// Codes beyond k are 0 in rows, so that those of panels do not matter.
struct IntegerLayout {
  int64_t k = 0;
  int64_t padded = 0;  // k rounded up to 16
  int64_t group = 0;   // columns; a multiple of 16, or `padded` if there is one group
  int64_t groups = 0;
  int64_t planes = 0;
  int64_t bits = 0;        // of a weight's code: 8 or 4
  bool own_zeros = false;  // else every zero is the middle code
  bool f16_scales = false;

  int64_t row_scales() const { return planes * padded; }
  int64_t row_sums() const { return row_scales() + groups * 4; }
  int64_t row_bytes() const { return round_up(row_sums() + planes * groups * 4, 64); }
  int64_t panel_scales() const { return padded * kPanelWidth * bits / 8; }
  int64_t panel_zeros() const { return panel_scales() + groups * kPanelWidth * (f16_scales ? 2 : 4); }
  int64_t panel_bytes() const { return round_up(panel_zeros() + (own_zeros ? groups * kPanelWidth : 0), 64); }
};

// out[r][c] = Σ_k x[r][k] * w[c][k] for r < rows, c < cols. w lies in panels of kPanelWidth outputs:
//  f32:  [k][kPanelWidth]; bf16: [ceil(k / 2)][kPanelWidth][2], the two values of a pair being k and k + 1; integers as
//  `integers` says.
struct GemmBlock {
  // A pointer per row: f32 [k], bf16 [round_up(k, 2)] where narrow_rows says so, or what to_integers wrote.
  const void* const* x = nullptr;
  int64_t rows = 0;  // <= kMaxGemmRows
  const std::byte* panels = nullptr;
  int64_t panel_bytes = 0;
  int64_t k = 0;
  int64_t cols = 0;             // the last panel may be partly used
  float* const* out = nullptr;  // a pointer per row, to the first of `cols` columns
  float* scratch = nullptr;     // kGemmScratch floats, 64-byte aligned; not for integers
  const IntegerLayout* integers = nullptr;
};

// Running softmax of one query vector: acc = Σ 2^(s_j - largest) v_j, sum = Σ 2^(s_j - largest).
struct SoftmaxState {
  float largest;
  float sum;
};

// Memory to be asked for while the products of another tile run, piece by piece.
struct Prefetch {
  const std::byte* pieces[2 * kTileSlabs] = {};
  int64_t num_pieces = 0;
  int64_t piece_bytes = 0;
  // How far it has come; `step_bytes` are asked for at a time.
  int64_t piece = 0;
  int64_t offset = 0;
  int64_t step_bytes = 0;
};

// Factors of a tile's keys: a score is the sum over the first `dims` dimensions times its position's factor, and on
// over the others.
struct KeyScales {
  const float* factors = nullptr;  // [kTile]; null: none
  int64_t dims = 0;                // even
};

// Keys and values of a tile in bf16, as pairs that one dot instruction takes: slab s holds the keys of positions
// s * kSlab … as [dim / 2][kSlab][2] and their values as [kSlab / 2][dim][2]. Pointers past the last slab repeat
// others.
struct PairTile {
  const uint16_t* keys[kTileSlabs] = {};
  const uint16_t* values[kTileSlabs] = {};
  KeyScales key_scales;
  // The same in fp8, to be widened on the way, instead of keys and values: null where not used. `dim` must be a
  // multiple of 32 and the strides those of dense slabs.
  const uint8_t* f8_keys[kTileSlabs] = {};
  const uint8_t* f8_values[kTileSlabs] = {};
  int64_t key_stride = 0;    // elements from one pair of dimensions to the next
  int64_t value_stride = 0;  // elements from one pair of positions to the next
  Prefetch* next = nullptr;  // what the caller reads next; null: nothing
};

// Scores of query vectors that see the same positions of a tile, on their way to weights.
struct SoftmaxTile {
  int64_t queries = 0;
  float* scores = nullptr;  // [queries][kTile]; becomes the weights, 0 from `visible` to the next multiple of 16
  int64_t visible = 0;
  float scale = 0.0F;                   // of scores, log2(e) included; above 0
  const float* value_scales = nullptr;  // [kTile] factors of weights, not in the sum; null: 1
  SoftmaxState* states = nullptr;
  float* acc = nullptr;  // [queries][dim], scaled to the new largest
  int64_t dim = 0;
  uint16_t* narrow_weights = nullptr;  // takes the weights instead of `scores`, as bf16; only with dot_pairs
};

struct Isa {
  const char* name;

  void (*gemm_f32)(const GemmBlock& block);
  void (*gemm_bf16)(const GemmBlock& block);
  bool narrow_rows;                                      // gemm_bf16 takes x rounded to bf16
  void (*gemm_bf16_wide_input)(const GemmBlock& block);  // never rounds x
  // By bits of the weight and of the activations; see WeightFormat for the rule, which all instruction sets follow bit
  // for bit.
  void (*gemm_int8_a8)(const GemmBlock& block);
  void (*gemm_int8_a16)(const GemmBlock& block);
  void (*gemm_int4_a8)(const GemmBlock& block);
  void (*gemm_int4_a16)(const GemmBlock& block);
  // Writes the integer form of x [layout.k].
  void (*to_integers)(const float* x, const IntegerLayout& layout, std::byte* row);

  // Rows. `to_bf16` rounds to nearest even; counts in elements.
  void (*to_bf16)(const float* x, int64_t count, uint16_t* out);
  void (*from_bf16)(const uint16_t* x, int64_t count, float* out);
  void (*add)(float* x, const float* y, int64_t count);
  void (*rms_norm)(const float* x, const float* weight, int64_t count, float eps, float* out);
  void (*silu_mul)(const float* gate, const float* up, int64_t count, float* out);
  void (*softmax)(const float* x, int64_t count, float* out);
  void (*sigmoid)(const float* x, int64_t count, float* out);
  // Rotates the pairs (a[i], b[i]).
  void (*rotate_halves)(float* a, float* b, const float* cosine, const float* sine, int64_t count);
  // Rotates the pairs (x[2i], x[2i + 1]).
  void (*rotate_pairs)(float* x, const float* cosine, const float* sine, int64_t count);
  // out[i] = Σ_j weights[j] * terms[j * stride + i], j ascending.
  void (*weighted_sum)(const float* terms, int64_t stride, const float* weights, int64_t num_terms, int64_t count,
                       float* out);

  // Attention. Vectors lie `*_stride` elements apart; `dim` is a multiple of kPadding, queries <= kQueryBlock.
  // out[i * kTile + j] = Σ_d q[i][d] * keys[d * kTile + j] for i < queries, j < positions rounded up.
  void (*scores)(const float* q, int64_t q_stride, int64_t queries, const float* keys, const KeyScales& scales,
                 int64_t positions, int64_t dim, float* out);
  // Turns scores into weights 2^(scale * s_j - largest) and takes them into the state.
  void (*softmax_tile)(const SoftmaxTile& tile);
  // acc[i][d] += Σ_j weights[i * kTile + j] * values[j][d] for i < queries, begin <= j < end, j ascending.
  void (*accumulate)(const float* weights, int64_t queries, const float* values, int64_t value_stride, int64_t begin,
                     int64_t end, int64_t dim, float* acc, int64_t acc_stride);
  // The same with products of bf16 pairs, where the machine has them: q and weights in bf16, `pairs` of dimensions.
  // begin is even; a last single position's partner is not looked at.
  bool dot_pairs;  // whether the next four exist
  void (*score_pairs)(const uint16_t* q, int64_t q_stride, int64_t queries, const PairTile& tile, int64_t positions,
                      int64_t pairs, float* out);
  void (*accumulate_pairs)(const uint16_t* weights, int64_t queries, const PairTile& tile, int64_t begin, int64_t end,
                           int64_t dim, float* acc, int64_t acc_stride);
  // Round to nearest even, but numbers below the normal range become zeros, as they are in the products.
  void (*round_pairs)(const float* x, int64_t count, uint16_t* out);
  // out[2 i] = a[i], out[2 i + 1] = b[i]; count is a multiple of 16.
  void (*interleave)(const uint16_t* a, const uint16_t* b, int64_t count, uint16_t* out);
  // Takes a later part's state and acc into total's.
  void (*fold)(SoftmaxState* total, float* total_acc, const SoftmaxState* part, const float* part_acc, int64_t dim);
  // out[d] = acc[d] / state.sum.
  void (*finish)(const SoftmaxState* state, const float* acc, int64_t count, float* out);
  // out[i * out_stride + r] = rows[r][i] for r < kSlab; 4-byte elements, count is a multiple of 16.
  void (*transpose)(const float* const* rows, int64_t count, float* out, int64_t out_stride);
  // first[i] = x[2 i], second[i] = x[2 i + 1]; count, of pairs, is a multiple of 16. f8 is E4M3, without its scale.
  void (*split_pairs_bf16)(const uint16_t* x, int64_t count, float* first, float* second);
  void (*split_pairs_f8)(const uint8_t* x, int64_t count, float* first, float* second);
  void (*from_f8)(const uint8_t* x, int64_t count, float scale, float* out);  // out = scale * x
  void (*f8_to_bf16)(const uint8_t* x, int64_t count, uint16_t* out);         // exact
  float (*quantize_f8)(const float* x, int64_t count, uint8_t* codes);        // quantize_f8e4m3 of convert.h

  // The machine's limits (limits_inl.h): a loop of f32 multiply-adds in registers, and one that reads memory. The
  // results only keep the compiler from leaving the loops out.
  float (*run_fma)(int64_t rounds);
  int64_t fma_flops_per_round;
  int32_t (*run_dot)(int64_t rounds);  // products of 8-bit integers
  int64_t dot_ops_per_round;
  float (*run_read)(const std::byte* memory, int64_t bytes);
};

const Isa& isa_avx2();
const Isa& isa_avx512();
const Isa& isa_avx512_vnni();
const Isa& isa_avx512_bf16();

}  // namespace tandem::kernels::cpu
