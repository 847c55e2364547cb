// The three kinds of keys and values that attention runs over.
#pragma once

#include <span>

#include "src/kernels/cpu/attention.h"
#include "src/kernels/ops.h"
#include "src/kernels/shapes.h"

namespace tandem::kernels::cpu {

// Whether keys and values of a cache of this dtype are multiplied as bf16 pairs.
inline bool uses_pairs(const Isa& isa, DType cache_dtype) { return isa.dot_pairs && cache_dtype != DType::kF32; }

// Grouped query heads over a paged cache, which already holds pairs: whole slabs of bf16 are used where they lie.
class GqaSource final : public AttentionSource {
 public:
  GqaSource(const Isa& isa, const GqaShape& shape, const Tensor& q, std::span<const SequenceRows> sequences,
            const Tensor& block_table, const KvLayerView& cache, const Tensor& out)
      : isa_(isa), shape_(shape), q_(q), sequences_(sequences), block_table_(block_table), cache_(cache), out_(out) {}

  void load_query(int64_t row, int64_t head, float* query) const override;
  Tile load_tile(const TileRequest& request, const TileMemory& memory) const override;
  float* result(int64_t row, int64_t head) const override { return row_of<float>(out_, row) + head * shape_.head_dim; }

 private:
  // A tile's slabs in the cache's dtype; strides in elements, of which pairs of dimensions or positions are apart.
  struct Slabs {
    const std::byte* keys[kTileSlabs];
    const std::byte* values[kTileSlabs];
    int64_t key_stride;
    int64_t value_stride;
  };

  // Whether a slab lies in the cache as the products want it.
  bool has_whole_slabs() const { return cache_.block_size % kSlab == 0 && shape_.head_dim % kPadding == 0; }
  int64_t padded_dim() const { return round_up(shape_.head_dim, kPadding); }
  GqaHead head_at(int64_t sequence, int64_t kv_head, int64_t position) const;
  Slabs find_slabs(int64_t sequence, int64_t kv_head, int64_t first, int64_t count) const;
  Slabs copy_slabs(int64_t sequence, int64_t kv_head, int64_t first, int64_t count, std::byte* staging) const;
  void copy_scales(int64_t sequence, int64_t kv_head, int64_t first, int64_t count, float* scales) const;
  void use_slabs(const Slabs& slabs, PairTile* pairs) const;
  void widen_slabs_f8(const Slabs& slabs, int64_t count, const TileMemory& memory, PairTile* pairs) const;
  void split_slabs(const Slabs& slabs, int64_t count, const TileMemory& memory) const;
  // Whether the products widen fp8 themselves: for few queries, which otherwise wait for a widened copy.
  bool widens_on_the_way(const TileRequest& request) const;
  void plan_prefetch(const TileRequest& request, bool is_in_place, Prefetch* next) const;

  const Isa& isa_;
  const GqaShape shape_;
  const Tensor& q_;
  std::span<const SequenceRows> sequences_;
  const Tensor& block_table_;
  const KvLayerView& cache_;
  const Tensor& out_;
};

// MLA, absorbed: keys are the cache's rows, values their first latent_dim columns.
class LatentSource final : public AttentionSource {
 public:
  LatentSource(const Isa& isa, const LatentShape& shape, const Tensor& q_latent, const Tensor& q_pe,
               int64_t q_pe_head_stride, std::span<const SequenceRows> sequences, const Tensor& block_table,
               const KvLayerView& cache, const Tensor& out)
      : isa_(isa),
        shape_(shape),
        q_latent_(q_latent),
        q_pe_(q_pe),
        q_pe_head_stride_(q_pe_head_stride),
        sequences_(sequences),
        block_table_(block_table),
        cache_(cache),
        out_(out) {}

  void load_query(int64_t row, int64_t head, float* query) const override;
  Tile load_tile(const TileRequest& request, const TileMemory& memory) const override;
  float* result(int64_t row, int64_t head) const override {
    return row_of<float>(out_, row) + head * shape_.latent_dim;
  }

  // A key is the latent, to an even number of elements, then k_pe.
  static int64_t key_dim(const LatentShape& shape) { return round_up(shape.latent_dim, 2) + shape.rope_dim; }

 private:
  int64_t rope_begin() const { return round_up(shape_.latent_dim, 2); }
  int64_t key_stride() const { return round_up(key_dim(shape_), kRowPadding); }
  void widen_row(const LatentRow& source, bool use_pairs, std::byte* key) const;
  void plan_prefetch(const SequenceRows& sequence, int64_t first, int64_t count, Prefetch* next) const;

  const Isa& isa_;
  const LatentShape shape_;
  const Tensor& q_latent_;
  const Tensor& q_pe_;
  const int64_t q_pe_head_stride_;
  std::span<const SequenceRows> sequences_;
  const Tensor& block_table_;
  const KvLayerView& cache_;
  const Tensor& out_;
};

// MLA, expanded: keys and values are activations, a key's second part shared by all heads.
class ExpandedSource final : public AttentionSource {
 public:
  ExpandedSource(const Isa& isa, bool use_pairs, const Tensor& q, const Tensor& kv, const Tensor& k_pe,
                 int64_t nope_dim, int64_t value_dim, const Tensor& out)
      : isa_(isa),
        use_pairs_(use_pairs),
        q_(q),
        kv_(kv),
        k_pe_(k_pe),
        nope_dim_(nope_dim),
        value_dim_(value_dim),
        out_(out) {}

  void load_query(int64_t row, int64_t head, float* query) const override;
  Tile load_tile(const TileRequest& request, const TileMemory& memory) const override;
  float* result(int64_t row, int64_t head) const override { return row_of<float>(out_, row) + head * value_dim_; }

 private:
  const Isa& isa_;
  const bool use_pairs_;
  const Tensor& q_;
  const Tensor& kv_;
  const Tensor& k_pe_;
  const int64_t nope_dim_;
  const int64_t value_dim_;
  const Tensor& out_;
};

}  // namespace tandem::kernels::cpu
