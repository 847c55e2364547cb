// Attention over fixed tiles of absolute positions, whatever keys and values are made of.
//
// A row's result is built from tiles of kTile positions, tiles into splits of kSplit positions (a running softmax
// inside each), and splits into the result, always in ascending order. All three depend on absolute position alone, so
// it does not matter which rows share a tile's keys, or whether the splits of a long row are computed by one thread or
// by many. Positions that a row does not see are neither multiplied nor added.
#pragma once

#include <cstdint>
#include <vector>

#include "src/kernels/cpu/isa.h"
#include "src/kernels/cpu/scratch.h"
#include "src/kernels/cpu/thread_pool.h"

namespace tandem::kernels::cpu {

inline constexpr int64_t kSplit = 512;                          // positions; a multiple of kTile
inline constexpr int64_t kMaxQueries = 32;                      // query vectors that share a tile's keys and values
inline constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;  // of split results; beyond it rows are not split

// Consecutive rows of one sequence. Row i of it is at position first_position + i.
struct AttentionRows {
  int64_t sequence = 0;   // the source's own number
  int64_t first_row = 0;  // in the queries
  int64_t rows = 0;
  int64_t first_position = 0;
};

// Where queries, keys and values come from and where results go. Called by many threads at once.
class AttentionSource {
 public:
  virtual ~AttentionSource() = default;
  // The query vector of `head`, `query_dim` floats.
  virtual void load_query(int64_t row, int64_t head, float* query) const = 0;
  // Keys and values of `count` positions from `first` on, all in one tile: one per `key_stride` / `value_stride`
  // floats. Columns past the dimensions are zeroed. Where values_are_keys, `values` is not used.
  virtual void load_tile(int64_t sequence, int64_t kv_head, int64_t first, int64_t count, float* keys,
                         int64_t key_stride, float* values, int64_t value_stride) const = 0;
  virtual float* result(int64_t row, int64_t head) const = 0;
};

struct AttentionShape {
  int64_t kv_heads = 0;
  int64_t group = 0;      // query heads per kv head
  int64_t query_dim = 0;  // of queries and keys
  int64_t value_dim = 0;
  bool values_are_keys = false;  // a value is the beginning of its key (MLA, absorbed)
  float scale = 0.0F;
};

void attend(const Isa& isa, ThreadPool& pool, CpuStream& stream, const AttentionShape& shape,
            const AttentionSource& source, const std::vector<AttentionRows>& sequences);

}  // namespace tandem::kernels::cpu
