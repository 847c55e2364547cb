#include "src/kernels/shapes.h"

#include <string_view>

#include "src/base/check.h"

namespace tandem::kernels {
namespace {

void check_tensor(const Tensor& tensor, DType dtype, int64_t rows, int64_t cols) {
  CHECK_EQ(std::string_view(dtype_name(tensor.dtype)), std::string_view(dtype_name(dtype)));
  CHECK_EQ(tensor.rows, rows);
  CHECK_EQ(tensor.cols, cols);
  CHECK_GE(tensor.rows, 0);
  if (rows == 0) return;
  CHECK_GE(tensor.stride, cols);
  CHECK(tensor.address != nullptr);
  CHECK_EQ(reinterpret_cast<uintptr_t>(tensor.address) % static_cast<uintptr_t>(dtype_bytes(dtype)), 0U);
}

void check_f32(const Tensor& tensor, int64_t rows, int64_t cols) { check_tensor(tensor, DType::kF32, rows, cols); }

void check_cache(const KvLayerView& cache, int64_t bytes_per_token) {
  CHECK(cache.dtype == DType::kF32 || cache.dtype == DType::kBf16 || cache.dtype == DType::kF8E4M3);
  CHECK_GT(cache.block_size, 0);
  CHECK_GE(cache.num_blocks, 0);
  CHECK(cache.base != nullptr || cache.num_blocks == 0);
  CHECK_GE(cache.block_stride_bytes, cache.block_size * bytes_per_token);
  CHECK_EQ(cache.block_stride_bytes % dtype_bytes(cache.dtype), 0);
}

void check_latent_cache(const KvLayerView& cache, const LatentShape& shape) {
  check_cache(cache, cached_latent_bytes(cache.dtype, shape.latent_dim, shape.rope_dim));
  if (cache.dtype != DType::kF8E4M3) return;
  CHECK_EQ(shape.latent_dim % 2, 0);  // bf16 k_pe lies behind it
  CHECK_EQ(cache.block_stride_bytes % 2, 0);
}

void check_sequence(const SequenceRows& sequence, int64_t positions, const Tensor& block_table,
                    const KvLayerView& cache) {
  CHECK_GE(sequence.first_position, 0);
  CHECK_GE(sequence.block_table_offset, 0);
  CHECK_LE(int64_t{sequence.block_table_offset} + sequence.num_blocks, block_table.rows);
  CHECK_GE(sequence.num_blocks * cache.block_size, positions);
}

void check_sequences(std::span<const SequenceRows> sequences, int64_t rows, const Tensor& block_table,
                     const KvLayerView& cache) {
  check_tensor(block_table, DType::kI32, block_table.rows, 1);
  for (const SequenceRows& sequence : sequences) {
    CHECK_GE(sequence.num_rows, 0);
    CHECK_GE(sequence.first_row, 0);
    CHECK_LE(int64_t{sequence.first_row} + sequence.num_rows, rows);
    check_sequence(sequence, int64_t{sequence.first_position} + sequence.num_rows, block_table, cache);
  }
}

int64_t divide_exactly(int64_t value, int64_t divisor) {
  CHECK_GT(divisor, 0);
  CHECK_GT(value, 0);
  CHECK_EQ(value % divisor, 0);
  return value / divisor;
}

}  // namespace

void check_index(const char* what, int64_t index, int64_t limit) {
  if (index < 0 || index >= limit) [[unlikely]] {
    fail_check(__FILE__, __LINE__, fmt::format("{} is {}, must be in [0, {})", what, index, limit));
  }
}

void check_embed(const Weight& table, const Tensor& ids, const Tensor& out) {
  CHECK_EQ(table.batch(), 1);
  check_f32(out, out.rows, table.k());
  check_tensor(ids, DType::kI32, out.rows, 1);
}

void check_rms_norm(const Tensor& x, const Tensor& weight, const Tensor& out) {
  check_f32(weight, 1, weight.cols);
  divide_exactly(x.cols, weight.cols);
  check_f32(x, x.rows, x.cols);
  check_f32(out, x.rows, x.cols);
}

void check_same_shape(const Tensor& x, const Tensor& y) {
  check_f32(x, x.rows, x.cols);
  check_f32(y, x.rows, x.cols);
}

void check_linear(const Tensor& x, const Weight& weight, const Tensor& out) {
  CHECK_EQ(weight.batch(), 1);
  check_f32(x, x.rows, weight.k());
  check_f32(out, x.rows, weight.n());
}

void check_head_linear(const Tensor& x, int64_t x_head_stride, const Weight& weight, const Tensor& out,
                       int64_t out_head_stride) {
  check_f32(x, x.rows, x.cols);
  check_f32(out, x.rows, out.cols);
  CHECK_GE(x_head_stride, 0);
  CHECK_GE(out_head_stride, weight.n());
  CHECK_GE(x.cols, (weight.batch() - 1) * x_head_stride + weight.k());
  CHECK_GE(out.cols, (weight.batch() - 1) * out_head_stride + weight.n());
}

void check_rope(const Tensor& x, int64_t heads, int64_t head_stride, int64_t dim, const Tensor& positions,
                const Tensor& table) {
  check_f32(x, x.rows, x.cols);
  CHECK_GT(heads, 0);
  CHECK_GT(dim, 0);
  CHECK_EQ(dim % 2, 0);
  CHECK(heads == 1 || head_stride >= dim);
  CHECK_GE(x.cols, (heads - 1) * head_stride + dim);
  check_tensor(positions, DType::kI32, x.rows, 1);
  check_f32(table, table.rows, dim);
}

GqaShape check_write_kv(const Tensor& k, const Tensor& v, int64_t kv_heads, const Tensor& slots,
                        const KvLayerView& cache) {
  check_same_shape(k, v);
  check_tensor(slots, DType::kI64, k.rows, 1);
  const GqaShape shape{kv_heads, divide_exactly(k.cols, kv_heads), 0};
  check_cache(cache, 2 * kv_heads * cached_vector_bytes(cache.dtype, shape.head_dim));
  return shape;
}

LatentShape check_write_latent(const Tensor& latent, const Tensor& k_pe, const Tensor& slots,
                               const KvLayerView& cache) {
  check_f32(latent, latent.rows, latent.cols);
  check_f32(k_pe, latent.rows, k_pe.cols);
  check_tensor(slots, DType::kI64, latent.rows, 1);
  const LatentShape shape{latent.cols, k_pe.cols};
  check_latent_cache(cache, shape);
  return shape;
}

GqaShape check_attention(const Tensor& q, int64_t q_heads, int64_t kv_heads, std::span<const SequenceRows> sequences,
                         const Tensor& block_table, const KvLayerView& cache, const Tensor& out) {
  check_same_shape(q, out);
  const GqaShape shape{kv_heads, divide_exactly(q.cols, q_heads), divide_exactly(q_heads, kv_heads)};
  check_cache(cache, 2 * kv_heads * cached_vector_bytes(cache.dtype, shape.head_dim));
  check_sequences(sequences, q.rows, block_table, cache);
  return shape;
}

LatentShape check_mla_absorbed(const Tensor& q_latent, const Tensor& q_pe, int64_t q_pe_head_stride, int64_t heads,
                               std::span<const SequenceRows> sequences, const Tensor& block_table,
                               const KvLayerView& cache, const Tensor& out) {
  check_same_shape(q_latent, out);
  check_f32(q_pe, q_latent.rows, q_pe.cols);
  const LatentShape shape{divide_exactly(q_latent.cols, heads), q_pe.cols - (heads - 1) * q_pe_head_stride};
  CHECK_GT(shape.rope_dim, 0);
  CHECK(heads == 1 || q_pe_head_stride >= shape.rope_dim);
  check_latent_cache(cache, shape);
  check_sequences(sequences, q_latent.rows, block_table, cache);
  return shape;
}

LatentShape check_gather_latent(const SequenceRows& sequence, const Tensor& block_table, const KvLayerView& cache,
                                const Tensor& latent, const Tensor& k_pe) {
  check_f32(latent, latent.rows, latent.cols);
  check_f32(k_pe, latent.rows, k_pe.cols);
  const LatentShape shape{latent.cols, k_pe.cols};
  check_latent_cache(cache, shape);
  check_tensor(block_table, DType::kI32, block_table.rows, 1);
  check_sequence(sequence, latent.rows, block_table, cache);
  return shape;
}

void check_mla_expanded(const Tensor& q, const Tensor& kv, const Tensor& k_pe, int64_t heads, int64_t nope_dim,
                        int64_t value_dim, int64_t first_position, const Tensor& out) {
  CHECK_GE(first_position, 0);
  CHECK_GT(heads, 0);
  CHECK_GE(nope_dim, 0);
  CHECK_GT(value_dim, 0);
  const int64_t positions = first_position + q.rows;
  check_f32(q, q.rows, heads * (nope_dim + k_pe.cols));
  check_f32(kv, positions, heads * (nope_dim + value_dim));
  check_f32(k_pe, positions, k_pe.cols);
  check_f32(out, q.rows, heads * value_dim);
}

void check_silu_mul(const Tensor& gate_up, const Tensor& out) {
  check_f32(out, out.rows, out.cols);
  check_f32(gate_up, out.rows, 2 * out.cols);
}

void check_route(const Tensor& logits, const Tensor& bias, const RouterParams& params, const Tensor& ids,
                 const Tensor& weights) {
  check_f32(logits, logits.rows, logits.cols);
  if (bias.address != nullptr) check_f32(bias, 1, logits.cols);
  check_tensor(ids, DType::kI32, logits.rows, params.top_k);
  check_f32(weights, logits.rows, params.top_k);
  const int64_t group_size = divide_exactly(logits.cols, params.num_groups);
  CHECK_GT(params.top_k, 0);
  CHECK_GT(params.top_groups, 0);
  CHECK_LE(params.top_groups, params.num_groups);
  CHECK_LE(params.top_k, params.top_groups * group_size);
}

void check_sort_by_expert(const Tensor& ids, int64_t experts, const Tensor& order, const Tensor& offsets) {
  check_tensor(ids, DType::kI32, ids.rows, ids.cols);
  CHECK_GT(experts, 0);
  check_tensor(order, DType::kI32, ids.rows * ids.cols, 1);
  check_tensor(offsets, DType::kI32, experts + 1, 1);
}

namespace {

void check_experts(const Tensor& offsets, int64_t top_k, const Weight& gate_up, const Weight& down) {
  CHECK_GT(top_k, 0);
  check_tensor(offsets, DType::kI32, gate_up.batch() + 1, 1);
  CHECK_EQ(down.batch(), gate_up.batch());
  CHECK_EQ(2 * down.k(), gate_up.n());
  CHECK_EQ(down.n(), gate_up.k());
}

void check_encoded_rows(const Tensor& rows, int64_t row_bytes) {
  check_tensor(rows, DType::kU8, rows.rows, row_bytes);
  CHECK_EQ(reinterpret_cast<uintptr_t>(rows.address) % sizeof(float), 0U);
  CHECK_EQ(rows.stride % static_cast<int64_t>(sizeof(float)), 0);
}

}  // namespace

void check_expert_mlp(const Tensor& x, const Tensor& order, const Tensor& offsets, int64_t top_k, const Weight& gate_up,
                      const Weight& down, const Tensor& out) {
  check_experts(offsets, top_k, gate_up, down);
  check_f32(x, x.rows, gate_up.k());
  check_tensor(order, DType::kI32, x.rows * top_k, 1);
  check_f32(out, x.rows * top_k, down.n());
}

void check_encode_expert_rows(const Tensor& x, const Tensor& out, int64_t row_bytes) {
  check_f32(x, x.rows, x.cols);
  CHECK_EQ(out.rows, x.rows);
  check_encoded_rows(out, row_bytes);
}

void check_expert_mlp_encoded(const Tensor& rows, int64_t row_bytes, const Tensor& order, const Tensor& offsets,
                              int64_t top_k, const Weight& gate_up, const Weight& down, const float* out,
                              const Tensor& targets) {
  check_experts(offsets, top_k, gate_up, down);
  check_encoded_rows(rows, row_bytes);
  check_tensor(order, DType::kI32, order.rows, 1);
  check_tensor(targets, DType::kI64, order.rows, 1);
  CHECK_LE(element_of<int32_t>(offsets, gate_up.batch()), order.rows);
  CHECK(out != nullptr || order.rows == 0);
}

void check_combine(const Tensor& expert_out, const Tensor& weights, const Tensor& out) {
  check_f32(out, out.rows, out.cols);
  check_f32(weights, out.rows, weights.cols);
  check_f32(expert_out, out.rows * weights.cols, out.cols);
}

void check_gather_rows(const Tensor& x, const Tensor& indices, const Tensor& out) {
  check_f32(x, x.rows, x.cols);
  check_f32(out, out.rows, x.cols);
  check_tensor(indices, DType::kI32, out.rows, 1);
}

int64_t block_of(const SequenceRows& sequence, const Tensor& block_table, const KvLayerView& cache, int64_t position) {
  const int64_t index = position / cache.block_size;
  check_index("block of a position", index, sequence.num_blocks);
  const int64_t block = element_of<int32_t>(block_table, sequence.block_table_offset + index);
  check_index("block id", block, cache.num_blocks);
  return block;
}

GqaHead gqa_head(const KvLayerView& cache, const GqaShape& shape, int64_t block, int64_t kv_head) {
  const int64_t head_bytes = 2 * cache.block_size * cached_vector_bytes(cache.dtype, shape.head_dim);
  const int64_t part_bytes = cache.block_size * shape.head_dim * dtype_bytes(cache.dtype);
  std::byte* k = cache.base + block * cache.block_stride_bytes + kv_head * head_bytes;
  GqaHead head{k, k + part_bytes, nullptr, nullptr};
  if (cache.dtype == DType::kF8E4M3) {
    head.k_scales = head.v + part_bytes;
    head.v_scales = head.k_scales + cache.block_size * int64_t{sizeof(float)};
  }
  return head;
}

LatentRow latent_row(const KvLayerView& cache, const LatentShape& shape, int64_t block, int64_t offset) {
  const bool has_scales = cache.dtype == DType::kF8E4M3;
  LatentRow row;
  row.rope_dtype = has_scales ? DType::kBf16 : cache.dtype;
  const int64_t latent_bytes = shape.latent_dim * dtype_bytes(cache.dtype);
  const int64_t row_bytes = latent_bytes + shape.rope_dim * dtype_bytes(row.rope_dtype);
  std::byte* start = cache.base + block * cache.block_stride_bytes;
  row.latent = start + offset * row_bytes;
  row.rope = row.latent + latent_bytes;
  if (has_scales) row.scale = start + cache.block_size * row_bytes + offset * int64_t{sizeof(float)};
  return row;
}

}  // namespace tandem::kernels
