// The reference backend's cache writes and attention: scores of every visible position, softmax, weighted sum.
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "src/kernels/convert.h"
#include "src/kernels/ref/ref_ops.h"
#include "src/kernels/shapes.h"

namespace tandem::kernels {
namespace {

float load(const std::byte* row, DType dtype, int64_t index) {
  if (dtype == DType::kF32) return reinterpret_cast<const float*>(row)[index];
  return float_from_bf16(reinterpret_cast<const uint16_t*>(row)[index]);
}

void store(std::byte* row, DType dtype, int64_t index, float value) {
  if (dtype == DType::kF32) {
    reinterpret_cast<float*>(row)[index] = value;
  } else {
    reinterpret_cast<uint16_t*>(row)[index] = bf16_from_float(value);
  }
}

void store_vector(const float* values, int64_t count, int64_t first, DType dtype, std::byte* row) {
  for (int64_t i = 0; i < count; ++i) store(row, dtype, first + i, values[i]);
}

// softmax(scores), in place.
void normalize(std::vector<float>& scores) {
  const float largest = *std::max_element(scores.begin(), scores.end());
  float sum = 0.0F;
  for (float& score : scores) {
    score = std::exp(score - largest);
    sum += score;
  }
  for (float& score : scores) score /= sum;
}

// out[i] = Σ_j softmax(scale * dot(j)) * value(j, i) over positions j < visible.
void attend(int64_t visible, float scale, int64_t value_dim, const std::function<float(int64_t)>& dot,
            const std::function<float(int64_t, int64_t)>& value, float* out) {
  std::vector<float> weights(static_cast<size_t>(visible));
  for (int64_t j = 0; j < visible; ++j) weights[static_cast<size_t>(j)] = scale * dot(j);
  normalize(weights);
  for (int64_t i = 0; i < value_dim; ++i) {
    float sum = 0.0F;
    for (int64_t j = 0; j < visible; ++j) sum += weights[static_cast<size_t>(j)] * value(j, i);
    out[i] = sum;
  }
}

}  // namespace

void RefOps::write_kv(Stream& /*stream*/, const Tensor& k, const Tensor& v, int64_t kv_heads, const Tensor& slots,
                      const KvLayerView& cache) {
  const GqaShape shape = check_write_kv(k, v, kv_heads, slots, cache);
  for (int64_t t = 0; t < k.rows; ++t) {
    const int64_t slot = element_of<int64_t>(slots, t);
    check_index("cache slot", slot, cache.num_blocks * cache.block_size);
    const int64_t block = slot / cache.block_size;
    const int64_t offset = slot % cache.block_size;
    for (int64_t h = 0; h < kv_heads; ++h) {
      const int64_t first = h * shape.head_dim;
      store_vector(row_of<float>(k, t) + first, shape.head_dim, 0, cache.dtype,
                   gqa_address(cache, shape, block, 0, h, offset));
      store_vector(row_of<float>(v, t) + first, shape.head_dim, 0, cache.dtype,
                   gqa_address(cache, shape, block, 1, h, offset));
    }
  }
}

void RefOps::write_latent(Stream& /*stream*/, const Tensor& latent, const Tensor& k_pe, const Tensor& slots,
                          const KvLayerView& cache) {
  const LatentShape shape = check_write_latent(latent, k_pe, slots, cache);
  for (int64_t t = 0; t < latent.rows; ++t) {
    const int64_t slot = element_of<int64_t>(slots, t);
    check_index("cache slot", slot, cache.num_blocks * cache.block_size);
    std::byte* row = latent_address(cache, shape, slot / cache.block_size, slot % cache.block_size);
    store_vector(row_of<float>(latent, t), shape.latent_dim, 0, cache.dtype, row);
    store_vector(row_of<float>(k_pe, t), shape.rope_dim, shape.latent_dim, cache.dtype, row);
  }
}

void RefOps::attention(Stream& /*stream*/, const Tensor& q, int64_t q_heads, int64_t kv_heads, float scale,
                       std::span<const SequenceRows> sequences, const Tensor& block_table, const KvLayerView& cache,
                       const Tensor& out) {
  const GqaShape shape = check_attention(q, q_heads, kv_heads, sequences, block_table, cache, out);
  for (const SequenceRows& sequence : sequences) {
    for (int64_t i = 0; i < sequence.num_rows; ++i) {
      for (int64_t h = 0; h < q_heads; ++h) {
        const int64_t kv_head = h / shape.group;
        const float* query = row_of<float>(q, sequence.first_row + i) + h * shape.head_dim;
        const auto cached = [&](int64_t which, int64_t position) {
          const int64_t block = block_of(sequence, block_table, cache, position);
          return gqa_address(cache, shape, block, which, kv_head, position % cache.block_size);
        };
        const auto dot = [&](int64_t position) {
          const std::byte* key = cached(0, position);
          float sum = 0.0F;
          for (int64_t d = 0; d < shape.head_dim; ++d) sum += query[d] * load(key, cache.dtype, d);
          return sum;
        };
        const auto value = [&](int64_t position, int64_t d) { return load(cached(1, position), cache.dtype, d); };
        attend(sequence.first_position + i + 1, scale, shape.head_dim, dot, value,
               row_of<float>(out, sequence.first_row + i) + h * shape.head_dim);
      }
    }
  }
}

void RefOps::mla_attention_absorbed(Stream& /*stream*/, const Tensor& q_latent, const Tensor& q_pe,
                                    int64_t q_pe_head_stride, int64_t heads, float scale,
                                    std::span<const SequenceRows> sequences, const Tensor& block_table,
                                    const KvLayerView& cache, const Tensor& out) {
  const LatentShape shape =
      check_mla_absorbed(q_latent, q_pe, q_pe_head_stride, heads, sequences, block_table, cache, out);
  for (const SequenceRows& sequence : sequences) {
    for (int64_t i = 0; i < sequence.num_rows; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        const float* latent_query = row_of<float>(q_latent, sequence.first_row + i) + h * shape.latent_dim;
        const float* rope_query = row_of<float>(q_pe, sequence.first_row + i) + h * q_pe_head_stride;
        const auto cached = [&](int64_t position) {
          const int64_t block = block_of(sequence, block_table, cache, position);
          return latent_address(cache, shape, block, position % cache.block_size);
        };
        const auto dot = [&](int64_t position) {
          const std::byte* key = cached(position);
          float sum = 0.0F;
          for (int64_t d = 0; d < shape.latent_dim; ++d) sum += latent_query[d] * load(key, cache.dtype, d);
          for (int64_t d = 0; d < shape.rope_dim; ++d) {
            sum += rope_query[d] * load(key, cache.dtype, shape.latent_dim + d);
          }
          return sum;
        };
        const auto value = [&](int64_t position, int64_t d) { return load(cached(position), cache.dtype, d); };
        attend(sequence.first_position + i + 1, scale, shape.latent_dim, dot, value,
               row_of<float>(out, sequence.first_row + i) + h * shape.latent_dim);
      }
    }
  }
}

void RefOps::gather_latent(Stream& /*stream*/, const SequenceRows& sequence, const Tensor& block_table,
                           const KvLayerView& cache, const Tensor& latent, const Tensor& k_pe) {
  const LatentShape shape = check_gather_latent(sequence, block_table, cache, latent, k_pe);
  for (int64_t position = 0; position < latent.rows; ++position) {
    const int64_t block = block_of(sequence, block_table, cache, position);
    const std::byte* row = latent_address(cache, shape, block, position % cache.block_size);
    for (int64_t d = 0; d < shape.latent_dim; ++d) row_of<float>(latent, position)[d] = load(row, cache.dtype, d);
    for (int64_t d = 0; d < shape.rope_dim; ++d) {
      row_of<float>(k_pe, position)[d] = load(row, cache.dtype, shape.latent_dim + d);
    }
  }
}

void RefOps::mla_attention_expanded(Stream& /*stream*/, const Tensor& q, const Tensor& kv, const Tensor& k_pe,
                                    int64_t heads, int64_t nope_dim, int64_t value_dim, float scale,
                                    int64_t first_position, const Tensor& out) {
  check_mla_expanded(q, kv, k_pe, heads, nope_dim, value_dim, first_position, out);
  const int64_t rope_dim = k_pe.cols;
  for (int64_t i = 0; i < q.rows; ++i) {
    for (int64_t h = 0; h < heads; ++h) {
      const float* query = row_of<float>(q, i) + h * (nope_dim + rope_dim);
      const auto key_value = [&](int64_t position) { return row_of<float>(kv, position) + h * (nope_dim + value_dim); };
      const auto dot = [&](int64_t position) {
        float sum = 0.0F;
        for (int64_t d = 0; d < nope_dim; ++d) sum += query[d] * key_value(position)[d];
        for (int64_t d = 0; d < rope_dim; ++d) sum += query[nope_dim + d] * row_of<float>(k_pe, position)[d];
        return sum;
      };
      const auto value = [&](int64_t position, int64_t d) { return key_value(position)[nope_dim + d]; };
      attend(first_position + i + 1, scale, value_dim, dot, value, row_of<float>(out, i) + h * value_dim);
    }
  }
}

}  // namespace tandem::kernels
