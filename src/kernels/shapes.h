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
void check_combine(const Tensor& expert_out, const Tensor& weights, const Tensor& out);
void check_gather_rows(const Tensor& x, const Tensor& indices, const Tensor& out);

// Fails unless 0 <= index < limit. `what` names the index in the message.
void check_index(const char* what, int64_t index, int64_t limit);

// Block id of position `position` of a sequence, CHECKed against the cache.
int64_t block_of(const SequenceRows& sequence, const Tensor& block_table, const KvLayerView& cache, int64_t position);

// First byte of the vector at `offset` of a block. `which` is 0 for k and 1 for v.
std::byte* gqa_address(const KvLayerView& cache, const GqaShape& shape, int64_t block, int64_t which, int64_t kv_head,
                       int64_t offset);
std::byte* latent_address(const KvLayerView& cache, const LatentShape& shape, int64_t block, int64_t offset);

}  // namespace tandem::kernels
