// The reference backend's cache writes and attention: scores of every visible position, softmax, weighted sum.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "src/kernels/convert.h"
#include "src/kernels/ref/ref_ops.h"
#include "src/kernels/shapes.h"

namespace tandem::kernels {
namespace {

template <typename T>
T load_bytes(const std::byte* address) {
  T value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}

float load(const std::byte* row, DType dtype, int64_t index) {
  const std::byte* address = row + index * dtype_bytes(dtype);
  if (dtype == DType::kF32) return load_bytes<float>(address);
  if (dtype == DType::kF8E4M3) return float_from_f8e4m3(load_bytes<uint8_t>(address));
  return float_from_bf16(load_bytes<uint16_t>(address));
}

void store(std::byte* row, DType dtype, int64_t index, float value) {
  std::byte* address = row + index * dtype_bytes(dtype);
  if (dtype == DType::kF32) {
    std::memcpy(address, &value, sizeof(value));
  } else {
    const uint16_t bits = bf16_from_float(value);
    std::memcpy(address, &bits, sizeof(bits));
  }
}

// Writes value i of a vector to element index(i) of `part`, and the vector's scale if the dtype has one.
void store_vector(const float* values, int64_t count, DType dtype, std::byte* part,
                  const std::function<int64_t(int64_t)>& index, std::byte* scale_address) {
  if (dtype != DType::kF8E4M3) {
    for (int64_t i = 0; i < count; ++i) store(part, dtype, index(i), values[i]);
    return;
  }
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  const float scale = quantize_f8e4m3(values, count, codes.data());
  for (int64_t i = 0; i < count; ++i) part[index(i)] = std::byte{codes[static_cast<size_t>(i)]};
  std::memcpy(scale_address, &scale, sizeof(scale));
}

// Element d of a position of an MLA cache: the latent's, then those of k_pe.
float load_latent(const KvLayerView& cache, const LatentShape& shape, int64_t block, int64_t offset, int64_t d) {
  const LatentRow row = latent_row(cache, shape, block, offset);
  if (d >= shape.latent_dim) return load(row.rope, row.rope_dtype, d - shape.latent_dim);
  const float element = load(row.latent, cache.dtype, d);
  return row.scale == nullptr ? element : element * load_bytes<float>(row.scale);
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
    const auto scale_at = [&](std::byte* scales) {
      return scales == nullptr ? nullptr : scales + offset * int64_t{sizeof(float)};
    };
    for (int64_t h = 0; h < kv_heads; ++h) {
      const int64_t dim = shape.head_dim;
      const GqaHead head = gqa_head(cache, shape, block, h);
      store_vector(
          row_of<float>(k, t) + h * dim, dim, cache.dtype, head.k,
          [&](int64_t d) { return pair_index(d, dim, offset, cache.block_size); }, scale_at(head.k_scales));
      store_vector(
          row_of<float>(v, t) + h * dim, dim, cache.dtype, head.v,
          [&](int64_t d) { return pair_index(offset, cache.block_size, d, dim); }, scale_at(head.v_scales));
    }
  }
}

void RefOps::write_latent(Stream& /*stream*/, const Tensor& latent, const Tensor& k_pe, const Tensor& slots,
                          const KvLayerView& cache) {
  const LatentShape shape = check_write_latent(latent, k_pe, slots, cache);
  for (int64_t t = 0; t < latent.rows; ++t) {
    const int64_t slot = element_of<int64_t>(slots, t);
    check_index("cache slot", slot, cache.num_blocks * cache.block_size);
    const int64_t block = slot / cache.block_size;
    const int64_t offset = slot % cache.block_size;
    const LatentRow row = latent_row(cache, shape, block, offset);
    const auto in_order = [](int64_t d) { return d; };
    store_vector(row_of<float>(latent, t), shape.latent_dim, cache.dtype, row.latent, in_order, row.scale);
    store_vector(row_of<float>(k_pe, t), shape.rope_dim, row.rope_dtype, row.rope, in_order, nullptr);
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
        const int64_t dim = shape.head_dim;
        const auto head_at = [&](int64_t position) {
          return gqa_head(cache, shape, block_of(sequence, block_table, cache, position), kv_head);
        };
        const auto scaled = [&](float x, const std::byte* scales, int64_t offset) {
          return scales == nullptr ? x : x * load_bytes<float>(scales + offset * int64_t{sizeof(float)});
        };
        const auto dot = [&](int64_t position) {
          const GqaHead head = head_at(position);
          const int64_t offset = position % cache.block_size;
          float sum = 0.0F;
          for (int64_t d = 0; d < dim; ++d) {
            sum += query[d] * load(head.k, cache.dtype, pair_index(d, dim, offset, cache.block_size));
          }
          return scaled(sum, head.k_scales, offset);
        };
        const auto value = [&](int64_t position, int64_t d) {
          const GqaHead head = head_at(position);
          const int64_t offset = position % cache.block_size;
          const int64_t index = pair_index(offset, cache.block_size, d, dim);
          return scaled(load(head.v, cache.dtype, index), head.v_scales, offset);
        };
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
        const auto element = [&](int64_t position, int64_t d) {
          const int64_t block = block_of(sequence, block_table, cache, position);
          return load_latent(cache, shape, block, position % cache.block_size, d);
        };
        const auto dot = [&](int64_t position) {
          float sum = 0.0F;
          for (int64_t d = 0; d < shape.latent_dim; ++d) sum += latent_query[d] * element(position, d);
          for (int64_t d = 0; d < shape.rope_dim; ++d) sum += rope_query[d] * element(position, shape.latent_dim + d);
          return sum;
        };
        const auto value = element;
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
    const int64_t offset = position % cache.block_size;
    for (int64_t d = 0; d < shape.width(); ++d) {
      float* out = d < shape.latent_dim ? row_of<float>(latent, position) + d
                                        : row_of<float>(k_pe, position) + d - shape.latent_dim;
      *out = load_latent(cache, shape, block, offset, d);
    }
  }
}

void RefOps::mla_attention_expanded(Stream& /*stream*/, const Tensor& q, const Tensor& kv, const Tensor& k_pe,
                                    int64_t heads, int64_t nope_dim, int64_t value_dim, float scale,
                                    int64_t first_position, DType /*cache_dtype*/, const Tensor& out) {
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
