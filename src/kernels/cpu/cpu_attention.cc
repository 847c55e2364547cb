// Cache writes, and the three kinds of keys and values that attention runs over.
#include <algorithm>

#include "src/kernels/convert.h"
#include "src/kernels/cpu/attention.h"
#include "src/kernels/cpu/cpu_ops.h"
#include "src/kernels/shapes.h"

namespace tandem::kernels::cpu {
namespace {

// `rows` vectors of `dim` values that lie together in a cache, to f32 vectors `stride` apart, filled up with zeros.
void widen_rows(const Isa& isa, const std::byte* source, DType dtype, int64_t rows, int64_t dim, float* out,
                int64_t stride) {
  const auto widen = [&](int64_t first, int64_t count, float* target) {
    if (dtype == DType::kF32) {
      std::copy_n(reinterpret_cast<const float*>(source) + first, count, target);
    } else {
      isa.from_bf16(reinterpret_cast<const uint16_t*>(source) + first, count, target);
    }
  };
  if (dim == stride) return widen(0, rows * dim, out);
  for (int64_t r = 0; r < rows; ++r) {
    widen(r * dim, dim, out + r * stride);
    std::fill(out + r * stride + dim, out + (r + 1) * stride, 0.0F);
  }
}

// Calls visit(block, offset, count, done) for each run of positions [first, first + count) inside one block.
template <typename Visit>
void for_each_run(const SequenceRows& sequence, const Tensor& block_table, const KvLayerView& cache, int64_t first,
                  int64_t count, const Visit& visit) {
  for (int64_t done = 0; done < count;) {
    const int64_t offset = (first + done) % cache.block_size;
    const int64_t run = std::min(cache.block_size - offset, count - done);
    visit(block_of(sequence, block_table, cache, first + done), offset, run, done);
    done += run;
  }
}

class GqaSource final : public AttentionSource {
 public:
  GqaSource(const Isa& isa, const GqaShape& shape, const Tensor& q, std::span<const SequenceRows> sequences,
            const Tensor& block_table, const KvLayerView& cache, const Tensor& out)
      : isa_(isa), shape_(shape), q_(q), sequences_(sequences), block_table_(block_table), cache_(cache), out_(out) {}

  void load_query(int64_t row, int64_t head, float* query) const override {
    std::copy_n(row_of<float>(q_, row) + head * shape_.head_dim, shape_.head_dim, query);
  }
  void load_tile(int64_t sequence, int64_t kv_head, int64_t first, int64_t count, float* keys, int64_t key_stride,
                 float* values, int64_t value_stride) const override {
    for_each_run(sequences_[static_cast<size_t>(sequence)], block_table_, cache_, first, count,
                 [&](int64_t block, int64_t offset, int64_t run, int64_t done) {
                   widen_rows(isa_, gqa_address(cache_, shape_, block, 0, kv_head, offset), cache_.dtype, run,
                              shape_.head_dim, keys + done * key_stride, key_stride);
                   widen_rows(isa_, gqa_address(cache_, shape_, block, 1, kv_head, offset), cache_.dtype, run,
                              shape_.head_dim, values + done * value_stride, value_stride);
                 });
  }
  float* result(int64_t row, int64_t head) const override { return row_of<float>(out_, row) + head * shape_.head_dim; }

 private:
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

  void load_query(int64_t row, int64_t head, float* query) const override {
    std::copy_n(row_of<float>(q_latent_, row) + head * shape_.latent_dim, shape_.latent_dim, query);
    std::copy_n(row_of<float>(q_pe_, row) + head * q_pe_head_stride_, shape_.rope_dim, query + shape_.latent_dim);
  }
  void load_tile(int64_t sequence, int64_t /*kv_head*/, int64_t first, int64_t count, float* keys, int64_t key_stride,
                 float* /*values*/, int64_t /*value_stride*/) const override {
    for_each_run(sequences_[static_cast<size_t>(sequence)], block_table_, cache_, first, count,
                 [&](int64_t block, int64_t offset, int64_t run, int64_t done) {
                   widen_rows(isa_, latent_address(cache_, shape_, block, offset), cache_.dtype, run, shape_.width(),
                              keys + done * key_stride, key_stride);
                 });
  }
  float* result(int64_t row, int64_t head) const override {
    return row_of<float>(out_, row) + head * shape_.latent_dim;
  }

 private:
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
  ExpandedSource(const Tensor& q, const Tensor& kv, const Tensor& k_pe, int64_t nope_dim, int64_t value_dim,
                 const Tensor& out)
      : q_(q), kv_(kv), k_pe_(k_pe), nope_dim_(nope_dim), value_dim_(value_dim), out_(out) {}

  void load_query(int64_t row, int64_t head, float* query) const override {
    const int64_t dim = nope_dim_ + k_pe_.cols;
    std::copy_n(row_of<float>(q_, row) + head * dim, dim, query);
  }
  void load_tile(int64_t /*sequence*/, int64_t kv_head, int64_t first, int64_t count, float* keys, int64_t key_stride,
                 float* values, int64_t value_stride) const override {
    for (int64_t i = 0; i < count; ++i) {
      const float* source = row_of<float>(kv_, first + i) + kv_head * (nope_dim_ + value_dim_);
      float* key = keys + i * key_stride;
      float* value = values + i * value_stride;
      std::copy_n(source, nope_dim_, key);
      std::copy_n(row_of<float>(k_pe_, first + i), k_pe_.cols, key + nope_dim_);
      std::fill(key + nope_dim_ + k_pe_.cols, key + key_stride, 0.0F);
      std::copy_n(source + nope_dim_, value_dim_, value);
      std::fill(value + value_dim_, value + value_stride, 0.0F);
    }
  }
  float* result(int64_t row, int64_t head) const override { return row_of<float>(out_, row) + head * value_dim_; }

 private:
  const Tensor& q_;
  const Tensor& kv_;
  const Tensor& k_pe_;
  const int64_t nope_dim_;
  const int64_t value_dim_;
  const Tensor& out_;
};

std::vector<AttentionRows> number_sequences(std::span<const SequenceRows> sequences) {
  std::vector<AttentionRows> rows;
  for (size_t i = 0; i < sequences.size(); ++i) {
    rows.push_back(AttentionRows{static_cast<int64_t>(i), sequences[i].first_row, sequences[i].num_rows,
                                 sequences[i].first_position});
  }
  return rows;
}

}  // namespace

void CpuOps::store_cached(const float* values, int64_t count, DType dtype, std::byte* address) const {
  if (dtype == DType::kF32) {
    std::copy_n(values, count, reinterpret_cast<float*>(address));
  } else {
    isa_.to_bf16(values, count, reinterpret_cast<uint16_t*>(address));
  }
}

void CpuOps::load_cached(const std::byte* address, int64_t count, DType dtype, float* values) const {
  widen_rows(isa_, address, dtype, 1, count, values, count);
}

void CpuOps::write_kv(Stream& /*stream*/, const Tensor& k, const Tensor& v, int64_t kv_heads, const Tensor& slots,
                      const KvLayerView& cache) {
  const GqaShape shape = check_write_kv(k, v, kv_heads, slots, cache);
  for_each_row(k.rows, 2 * k.cols, [&](int64_t t) {
    const int64_t slot = element_of<int64_t>(slots, t);
    check_index("cache slot", slot, cache.num_blocks * cache.block_size);
    const int64_t block = slot / cache.block_size;
    const int64_t offset = slot % cache.block_size;
    for (int64_t h = 0; h < kv_heads; ++h) {
      const int64_t first = h * shape.head_dim;
      store_cached(row_of<float>(k, t) + first, shape.head_dim, cache.dtype,
                   gqa_address(cache, shape, block, 0, h, offset));
      store_cached(row_of<float>(v, t) + first, shape.head_dim, cache.dtype,
                   gqa_address(cache, shape, block, 1, h, offset));
    }
  });
}

void CpuOps::write_latent(Stream& /*stream*/, const Tensor& latent, const Tensor& k_pe, const Tensor& slots,
                          const KvLayerView& cache) {
  const LatentShape shape = check_write_latent(latent, k_pe, slots, cache);
  for_each_row(latent.rows, shape.width(), [&](int64_t t) {
    const int64_t slot = element_of<int64_t>(slots, t);
    check_index("cache slot", slot, cache.num_blocks * cache.block_size);
    std::byte* row = latent_address(cache, shape, slot / cache.block_size, slot % cache.block_size);
    store_cached(row_of<float>(latent, t), shape.latent_dim, cache.dtype, row);
    store_cached(row_of<float>(k_pe, t), shape.rope_dim, cache.dtype,
                 row + shape.latent_dim * dtype_bytes(cache.dtype));
  });
}

void CpuOps::gather_latent(Stream& /*stream*/, const SequenceRows& sequence, const Tensor& block_table,
                           const KvLayerView& cache, const Tensor& latent, const Tensor& k_pe) {
  const LatentShape shape = check_gather_latent(sequence, block_table, cache, latent, k_pe);
  for_each_row(latent.rows, shape.width(), [&](int64_t position) {
    const int64_t block = block_of(sequence, block_table, cache, position);
    const std::byte* row = latent_address(cache, shape, block, position % cache.block_size);
    load_cached(row, shape.latent_dim, cache.dtype, row_of<float>(latent, position));
    load_cached(row + shape.latent_dim * dtype_bytes(cache.dtype), shape.rope_dim, cache.dtype,
                row_of<float>(k_pe, position));
  });
}

void CpuOps::attention(Stream& stream, const Tensor& q, int64_t q_heads, int64_t kv_heads, float scale,
                       std::span<const SequenceRows> sequences, const Tensor& block_table, const KvLayerView& cache,
                       const Tensor& out) {
  const GqaShape shape = check_attention(q, q_heads, kv_heads, sequences, block_table, cache, out);
  const GqaSource source(isa_, shape, q, sequences, block_table, cache, out);
  attend(isa_, pool_, static_cast<CpuStream&>(stream),
         AttentionShape{kv_heads, shape.group, shape.head_dim, shape.head_dim, false, scale}, source,
         number_sequences(sequences));
}

void CpuOps::mla_attention_absorbed(Stream& stream, const Tensor& q_latent, const Tensor& q_pe,
                                    int64_t q_pe_head_stride, int64_t heads, float scale,
                                    std::span<const SequenceRows> sequences, const Tensor& block_table,
                                    const KvLayerView& cache, const Tensor& out) {
  const LatentShape shape =
      check_mla_absorbed(q_latent, q_pe, q_pe_head_stride, heads, sequences, block_table, cache, out);
  const LatentSource source(isa_, shape, q_latent, q_pe, q_pe_head_stride, sequences, block_table, cache, out);
  attend(isa_, pool_, static_cast<CpuStream&>(stream),
         AttentionShape{1, heads, shape.width(), shape.latent_dim, true, scale}, source, number_sequences(sequences));
}

void CpuOps::mla_attention_expanded(Stream& stream, const Tensor& q, const Tensor& kv, const Tensor& k_pe,
                                    int64_t heads, int64_t nope_dim, int64_t value_dim, float scale,
                                    int64_t first_position, const Tensor& out) {
  check_mla_expanded(q, kv, k_pe, heads, nope_dim, value_dim, first_position, out);
  const ExpandedSource source(q, kv, k_pe, nope_dim, value_dim, out);
  attend(isa_, pool_, static_cast<CpuStream&>(stream),
         AttentionShape{heads, 1, nope_dim + k_pe.cols, value_dim, false, scale}, source,
         {AttentionRows{0, 0, q.rows, first_position}});
}

}  // namespace tandem::kernels::cpu
