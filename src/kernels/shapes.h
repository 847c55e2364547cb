// The shape rules of ops.h as CHECKs, shared by the backends on the host, and typed access to views of host memory.
// Each function returns the sizes that the operation needs and that only its operands tell.
#pragma once

#include <cstdint>
#include <span>

#include "src/kernels/ops.h"

namespace tandem::kernels {

template <typename T>
T* row_of(const Tensor& tensor, int64_t row) {
  return reinterpret_cast<T*>(tensor.address) + row * tensor.stride;
}

// A [rows, 1] column.
template <typename T>
T element_of(const Tensor& column, int64_t row) {
  return *row_of<const T>(column, row);
}

struct GqaShape {
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t group = 0;  // query heads per kv head; 0 where there is no query
};

struct LatentShape {
  int64_t latent_dim = 0;  // L
  int64_t rope_dim = 0;    // R
  int64_t width() const { return latent_dim + rope_dim; }
};

void check_embed(const Weight& table, const Tensor& ids, const Tensor& out);
void check_rms_norm(const Tensor& x, const Tensor& weight, const Tensor& out);
void check_same_shape(const Tensor& x, const Tensor& y);
void check_linear(const Tensor& x, const Weight& weight, const Tensor& out);
void check_head_linear(const Tensor& x, int64_t x_head_stride, const Weight& weight, const Tensor& out,
                       int64_t out_head_stride);
void check_rope(const Tensor& x, int64_t heads, int64_t head_stride, int64_t dim, const Tensor& positions,
                const Tensor& table);
GqaShape check_write_kv(const Tensor& k, const Tensor& v, int64_t kv_heads, const Tensor& slots,
                        const KvLayerView& cache);
LatentShape check_write_latent(const Tensor& latent, const Tensor& k_pe, const Tensor& slots, const KvLayerView& cache);
GqaShape check_attention(const Tensor& q, int64_t q_heads, int64_t kv_heads, std::span<const SequenceRows> sequences,
                         const Tensor& block_table, const KvLayerView& cache, const Tensor& out);
LatentShape check_mla_absorbed(const Tensor& q_latent, const Tensor& q_pe, int64_t q_pe_head_stride, int64_t heads,
                               std::span<const SequenceRows> sequences, const Tensor& block_table,
                               const KvLayerView& cache, const Tensor& out);
LatentShape check_gather_latent(const SequenceRows& sequence, const Tensor& block_table, const KvLayerView& cache,
                                const Tensor& latent, const Tensor& k_pe);
void check_mla_expanded(const Tensor& q, const Tensor& kv, const Tensor& k_pe, int64_t heads, int64_t nope_dim,
                        int64_t value_dim, int64_t first_position, const Tensor& out);
void check_silu_mul(const Tensor& gate_up, const Tensor& out);
void check_route(const Tensor& logits, const Tensor& bias, const RouterParams& params, const Tensor& ids,
                 const Tensor& weights);
void check_sort_by_expert(const Tensor& ids, int64_t experts, const Tensor& order, const Tensor& offsets);
void check_expert_mlp(const Tensor& x, const Tensor& order, const Tensor& offsets, int64_t top_k, const Weight& gate_up,
                      const Weight& down, const Tensor& out);
void check_encode_expert_rows(const Tensor& x, const Tensor& out, int64_t row_bytes);
void check_expert_mlp_encoded(const Tensor& rows, int64_t row_bytes, const Tensor& order, const Tensor& offsets,
                              int64_t top_k, const Weight& gate_up, const Weight& down, const float* out,
                              const Tensor& targets);
void check_combine(const Tensor& expert_out, const Tensor& weights, const Tensor& out);
void check_gather_rows(const Tensor& x, const Tensor& indices, const Tensor& out);

// Fails unless 0 <= index < limit. `what` names the index in the message.
void check_index(const char* what, int64_t index, int64_t limit);

// Block id of position `position` of a sequence, CHECKed against the cache.
int64_t block_of(const SequenceRows& sequence, const Tensor& block_table, const KvLayerView& cache, int64_t position);

// Bytes of a cached vector: its elements, and its scale where the dtype has one.
constexpr int64_t cached_vector_bytes(DType dtype, int64_t dim) {
  return dim * dtype_bytes(dtype) + (dtype == DType::kF8E4M3 ? int64_t{sizeof(float)} : 0);
}

// Bytes of a position of an MLA cache.
constexpr int64_t cached_latent_bytes(DType dtype, int64_t latent_dim, int64_t rope_dim) {
  const DType rope_dtype = dtype == DType::kF8E4M3 ? DType::kBf16 : dtype;
  return cached_vector_bytes(dtype, latent_dim) + rope_dim * dtype_bytes(rope_dtype);
}

// Where element (row, col) of a [rows, cols] matrix lies if rows are interleaved by pairs: [rows / 2][cols][2], then
// the last row of an odd number as it is.
constexpr int64_t pair_index(int64_t row, int64_t rows, int64_t col, int64_t cols) {
  if (row == rows - 1 && row % 2 == 0) return row * cols + col;
  return (row / 2 * cols + col) * 2 + row % 2;
}

// The parts of one kv head of one block: k is [head_dim, block_size] and v [block_size, head_dim], both by pair_index.
struct GqaHead {
  std::byte* k = nullptr;
  std::byte* v = nullptr;
  std::byte* k_scales = nullptr;  // f32 [block_size], any alignment; null without scales
  std::byte* v_scales = nullptr;
};
GqaHead gqa_head(const KvLayerView& cache, const GqaShape& shape, int64_t block, int64_t kv_head);

// The parts of one position of an MLA block.
struct LatentRow {
  std::byte* latent = nullptr;
  std::byte* rope = nullptr;  // behind the latent, of rope_dtype
  DType rope_dtype = DType::kBf16;
  std::byte* scale = nullptr;  // f32, any alignment; null without scales
};
LatentRow latent_row(const KvLayerView& cache, const LatentShape& shape, int64_t block, int64_t offset);

}  // namespace tandem::kernels
