// Cache writes and the three kinds of attention.
#include <algorithm>
#include <cstring>

#include "src/kernels/cpu/attention_sources.h"
#include "src/kernels/cpu/cpu_ops.h"

namespace tandem::kernels::cpu {
namespace {

// A vector's elements in the cache's dtype. Returns its scale, 1 where it has none.
float narrow_vector(const Isa& isa, const float* values, int64_t count, DType dtype, std::byte* out) {
  if (dtype == DType::kF8E4M3) return isa.quantize_f8(values, count, reinterpret_cast<uint8_t*>(out));
  if (dtype == DType::kBf16) {
    isa.to_bf16(values, count, reinterpret_cast<uint16_t*>(out));
  } else {
    std::copy_n(values, count, reinterpret_cast<float*>(out));
  }
  return 1.0F;
}

// Puts elements where index(i) says. Bytes are written one element at a time, since other threads write the neighbours.
template <typename T, typename Index>
void scatter(const std::byte* elements, int64_t count, std::byte* part, const Index& index) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(part + index(i) * int64_t{sizeof(T)}, elements + i * int64_t{sizeof(T)}, sizeof(T));
  }
}

// One k and one v vector of a head, to position `offset` of a block.
template <typename T>
void write_head(const Isa& isa, const float* k, const float* v, const GqaHead& head, int64_t dim, int64_t offset,
                const KvLayerView& cache, std::byte* elements) {
  const float k_scale = narrow_vector(isa, k, dim, cache.dtype, elements);
  scatter<T>(elements, dim, head.k, [&](int64_t d) { return pair_index(d, dim, offset, cache.block_size); });
  const float v_scale = narrow_vector(isa, v, dim, cache.dtype, elements);
  scatter<T>(elements, dim, head.v, [&](int64_t d) { return pair_index(offset, cache.block_size, d, dim); });
  if (head.k_scales == nullptr) return;
  std::memcpy(head.k_scales + offset * int64_t{sizeof(float)}, &k_scale, sizeof(float));
  std::memcpy(head.v_scales + offset * int64_t{sizeof(float)}, &v_scale, sizeof(float));
}

std::vector<AttentionRows> number_sequences(std::span<const SequenceRows> sequences) {
  std::vector<AttentionRows> rows;
  for (size_t i = 0; i < sequences.size(); ++i) {
    rows.push_back(AttentionRows{static_cast<int64_t>(i), sequences[i].first_row, sequences[i].num_rows,
                                 sequences[i].first_position});
  }
  return rows;
}

}  // namespace

void CpuOps::write_kv(Stream& stream, const Tensor& k, const Tensor& v, int64_t kv_heads, const Tensor& slots,
                      const KvLayerView& cache) {
  const GqaShape shape = check_write_kv(k, v, kv_heads, slots, cache);
  const int64_t floats = round_up(shape.head_dim, 16);  // a row's place for the elements of one vector
  float* elements = static_cast<CpuStream&>(stream).rows.get<float>(k.rows * floats);
  const auto write = cache.dtype == DType::kF8E4M3 ? write_head<uint8_t>
                     : cache.dtype == DType::kBf16 ? write_head<uint16_t>
                                                   : write_head<float>;
  for_each_row(k.rows, 2 * k.cols, [&](int64_t t) {
    const int64_t slot = element_of<int64_t>(slots, t);
    check_index("cache slot", slot, cache.num_blocks * cache.block_size);
    for (int64_t h = 0; h < kv_heads; ++h) {
      write(isa_, row_of<float>(k, t) + h * shape.head_dim, row_of<float>(v, t) + h * shape.head_dim,
            gqa_head(cache, shape, slot / cache.block_size, h), shape.head_dim, slot % cache.block_size, cache,
            reinterpret_cast<std::byte*>(elements + t * floats));
    }
  });
}

void CpuOps::write_latent(Stream& /*stream*/, const Tensor& latent, const Tensor& k_pe, const Tensor& slots,
                          const KvLayerView& cache) {
  const LatentShape shape = check_write_latent(latent, k_pe, slots, cache);
  for_each_row(latent.rows, shape.width(), [&](int64_t t) {
    const int64_t slot = element_of<int64_t>(slots, t);
    check_index("cache slot", slot, cache.num_blocks * cache.block_size);
    const LatentRow row = latent_row(cache, shape, slot / cache.block_size, slot % cache.block_size);
    const float scale = narrow_vector(isa_, row_of<float>(latent, t), shape.latent_dim, cache.dtype, row.latent);
    narrow_vector(isa_, row_of<float>(k_pe, t), shape.rope_dim, row.rope_dtype, row.rope);
    if (row.scale != nullptr) std::memcpy(row.scale, &scale, sizeof(scale));
  });
}

void CpuOps::gather_latent(Stream& /*stream*/, const SequenceRows& sequence, const Tensor& block_table,
                           const KvLayerView& cache, const Tensor& latent, const Tensor& k_pe) {
  const LatentShape shape = check_gather_latent(sequence, block_table, cache, latent, k_pe);
  for_each_row(latent.rows, shape.width(), [&](int64_t position) {
    const int64_t block = block_of(sequence, block_table, cache, position);
    const LatentRow row = latent_row(cache, shape, block, position % cache.block_size);
    const auto widen = [&](const std::byte* elements, DType dtype, int64_t count, float* out) {
      if (dtype == DType::kF8E4M3) {
        float scale;
        std::memcpy(&scale, row.scale, sizeof(scale));
        isa_.from_f8(reinterpret_cast<const uint8_t*>(elements), count, scale, out);
      } else if (dtype == DType::kBf16) {
        isa_.from_bf16(reinterpret_cast<const uint16_t*>(elements), count, out);
      } else {
        std::copy_n(reinterpret_cast<const float*>(elements), count, out);
      }
    };
    widen(row.latent, cache.dtype, shape.latent_dim, row_of<float>(latent, position));
    widen(row.rope, row.rope_dtype, shape.rope_dim, row_of<float>(k_pe, position));
  });
}

void CpuOps::attention(Stream& stream, const Tensor& q, int64_t q_heads, int64_t kv_heads, float scale,
                       std::span<const SequenceRows> sequences, const Tensor& block_table, const KvLayerView& cache,
                       const Tensor& out) {
  const GqaShape shape = check_attention(q, q_heads, kv_heads, sequences, block_table, cache, out);
  const GqaSource source(isa_, shape, q, sequences, block_table, cache, out);
  attend(isa_, pool_, static_cast<CpuStream&>(stream),
         AttentionShape{kv_heads, shape.group, shape.head_dim, shape.head_dim, kPadding, uses_pairs(isa_, cache.dtype),
                        scale},
         source, number_sequences(sequences));
}

void CpuOps::mla_attention_absorbed(Stream& stream, const Tensor& q_latent, const Tensor& q_pe,
                                    int64_t q_pe_head_stride, int64_t heads, float scale,
                                    std::span<const SequenceRows> sequences, const Tensor& block_table,
                                    const KvLayerView& cache, const Tensor& out) {
  const LatentShape shape =
      check_mla_absorbed(q_latent, q_pe, q_pe_head_stride, heads, sequences, block_table, cache, out);
  const LatentSource source(isa_, shape, q_latent, q_pe, q_pe_head_stride, sequences, block_table, cache, out);
  attend(isa_, pool_, static_cast<CpuStream&>(stream),
         AttentionShape{1, heads, LatentSource::key_dim(shape), shape.latent_dim, kRowPadding,
                        uses_pairs(isa_, cache.dtype), scale},
         source, number_sequences(sequences));
}

void CpuOps::mla_attention_expanded(Stream& stream, const Tensor& q, const Tensor& kv, const Tensor& k_pe,
                                    int64_t heads, int64_t nope_dim, int64_t value_dim, float scale,
                                    int64_t first_position, DType cache_dtype, const Tensor& out) {
  check_mla_expanded(q, kv, k_pe, heads, nope_dim, value_dim, first_position, out);
  const bool use_pairs = uses_pairs(isa_, cache_dtype);
  const ExpandedSource source(isa_, use_pairs, q, kv, k_pe, nope_dim, value_dim, out);
  attend(isa_, pool_, static_cast<CpuStream&>(stream),
         AttentionShape{heads, 1, nope_dim + k_pe.cols, value_dim, kRowPadding, use_pairs, scale}, source,
         {AttentionRows{0, 0, q.rows, first_position}});
}

}  // namespace tandem::kernels::cpu
