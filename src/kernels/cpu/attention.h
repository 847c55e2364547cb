// Attention over fixed tiles of absolute positions, whatever keys and values are made of.
//
// A row's result is built from tiles of kTile positions, tiles into splits of kSplit positions (a running softmax
// inside each), and splits into the result, always in ascending order. All three depend on absolute position alone, so
// it does not matter which rows share a tile's keys, or whether the splits of a long row are computed by one thread or
// by many. Positions that a row does not see are not added.
//
// Products run in f32, or, where the machine has dot products of bf16 pairs and the cache is not f32, on queries and
// softmax weights (in the expanded form keys and values too) rounded to bf16. What that costs, and why a second part of
// each query is not worth its time: "Attention" in docs/performance.md.
#pragma once

#include <cstdint>
#include <vector>

#include "src/kernels/cpu/isa.h"
#include "src/kernels/cpu/scratch.h"
#include "src/kernels/cpu/thread_pool.h"

namespace tandem::kernels::cpu {

inline constexpr int64_t kSplit = 512;                          // positions; a multiple of kTile
inline constexpr int64_t kMaxQueries = 128;                     // query vectors that share a tile's keys and values
inline constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;  // of split results; beyond it rows are not split

// Consecutive rows of one sequence. Row i of it is at position first_position + i.
struct AttentionRows {
  int64_t sequence = 0;   // the source's own number
  int64_t first_row = 0;  // in the queries
  int64_t rows = 0;
  int64_t first_position = 0;
};

struct AttentionShape {
  int64_t kv_heads = 0;
  int64_t group = 0;      // query heads per kv head
  int64_t query_dim = 0;  // of queries and keys
  int64_t value_dim = 0;
  int64_t query_padding = kPadding;  // keys are filled up with zeros to a multiple of this
  bool use_pairs = false;            // products of bf16 pairs, else of f32
  float scale = 0.0F;

  int64_t query_stride() const { return round_up(query_dim, query_padding); }
  int64_t value_stride() const { return round_up(value_dim, kPadding); }
};

// One tile, as the products of `use_pairs` want it: keys filled up to query_stride, values to value_stride. What lies
// at positions that were not asked for may be anything.
struct Tile {
  PairTile pairs;               // with use_pairs
  const float* keys = nullptr;  // without: [query_stride][kTile]
  const float* values = nullptr;
  int64_t value_stride = 0;
  KeyScales key_scales;                 // without; else those of `pairs`
  const float* value_scales = nullptr;  // [kTile] factors of values; null: 1
};

// Memory of one thread that a source may put a tile in, each aligned to 64 bytes.
struct TileMemory {
  float* keys;         // query_stride * kTile
  float* values;       // value_stride * kTile
  std::byte* staging;  // (query_stride + value_stride) * kTile floats
  float* scales;       // 2 * kTile
  Prefetch* next;
};

// Keys and values of `count` positions from `first` on, a multiple of kTile.
struct TileRequest {
  int64_t sequence = 0;
  int64_t kv_head = 0;
  int64_t first = 0;
  int64_t count = 0;
  // Hints: how many positions behind them the same thread will want next, and how many query vectors share the tile.
  int64_t next_count = 0;
  int64_t queries = 0;
};

// Where queries, keys and values come from and where results go. Called by many threads at once.
class AttentionSource {
 public:
  virtual ~AttentionSource() = default;
  // The query vector of `head`, `query_dim` floats.
  virtual void load_query(int64_t row, int64_t head, float* query) const = 0;
  virtual Tile load_tile(const TileRequest& request, const TileMemory& memory) const = 0;
  virtual float* result(int64_t row, int64_t head) const = 0;
};

void attend(const Isa& isa, ThreadPool& pool, CpuStream& stream, const AttentionShape& shape,
            const AttentionSource& source, const std::vector<AttentionRows>& sequences);

}  // namespace tandem::kernels::cpu
