// The reference backend: every operation as its definition reads, one thread, plain C++, sums in f32 from the first
// element to the last. It is the oracle of all other backends, so nothing here may be clever.
#pragma once

#include <vector>

#include "src/kernels/host_ops.h"
#include "src/kernels/integer.h"

namespace tandem::kernels {

class RefWeight final : public Weight {
 public:
  RefWeight(std::span<const HostMatrix> matrices, const WeightFormat& format);

  int64_t batch() const override { return batch_; }
  int64_t n() const override { return n_; }
  int64_t k() const override { return k_; }
  WeightFormat format() const override { return format_; }
  int64_t bytes() const override;
  DType scale_dtype() const override { return DType::kF32; }
  // Not for integer formats.
  float at(int64_t matrix, int64_t n, int64_t k) const;
  // Only for integer formats.
  const IntegerWeightRow& integer_row(int64_t matrix, int64_t n) const {
    return integers_[static_cast<size_t>(matrix * n_ + n)];
  }

 private:
  int64_t batch_;
  int64_t n_;
  int64_t k_;
  WeightFormat format_;
  std::vector<float> f32_;                  // [batch, n, k] with kF32
  std::vector<uint16_t> bf16_;              // the same with kBf16
  std::vector<IntegerWeightRow> integers_;  // [batch, n] with kInt8 and kInt4
};

class RefOps final : public HostOps {
 public:
  std::string name() const override { return "ref"; }
  int num_threads() const override { return 1; }

  std::unique_ptr<Weight> pack_weight(std::span<const HostMatrix> matrices, const WeightFormat& format) override;
  void embed(Stream& stream, const Weight& table, const Tensor& ids, const Tensor& out) override;
  void rms_norm(Stream& stream, const Tensor& x, const Tensor& weight, float eps, const Tensor& out) override;
  void add_rms_norm(Stream& stream, const Tensor& residual, const Tensor& delta, const Tensor& weight, float eps,
                    const Tensor& out) override;
  void add(Stream& stream, const Tensor& x, const Tensor& y) override;
  void linear(Stream& stream, const Tensor& x, const Weight& weight, const Tensor& out) override;
  void linears(Stream& stream, const Tensor& x, std::span<const Weight* const> weights,
               std::span<const Tensor> outs) override;
  void head_linear(Stream& stream, const Tensor& x, int64_t x_head_stride, const Weight& weight, const Tensor& out,
                   int64_t out_head_stride) override;
  void rope(Stream& stream, const Tensor& x, int64_t heads, int64_t head_stride, int64_t dim, const Tensor& positions,
            const Tensor& table, bool interleaved) override;
  void write_kv(Stream& stream, const Tensor& k, const Tensor& v, int64_t kv_heads, const Tensor& slots,
                const KvLayerView& cache) override;
  void write_latent(Stream& stream, const Tensor& latent, const Tensor& k_pe, const Tensor& slots,
                    const KvLayerView& cache) override;
  void attention(Stream& stream, const Tensor& q, int64_t q_heads, int64_t kv_heads, float scale,
                 std::span<const SequenceRows> sequences, const Tensor& block_table, const KvLayerView& cache,
                 const Tensor& out) override;
  void mla_attention_absorbed(Stream& stream, const Tensor& q_latent, const Tensor& q_pe, int64_t q_pe_head_stride,
                              int64_t heads, float scale, std::span<const SequenceRows> sequences,
                              const Tensor& block_table, const KvLayerView& cache, const Tensor& out) override;
  void gather_latent(Stream& stream, const SequenceRows& sequence, const Tensor& block_table, const KvLayerView& cache,
                     const Tensor& latent, const Tensor& k_pe) override;
  void mla_attention_expanded(Stream& stream, const Tensor& q, const Tensor& kv, const Tensor& k_pe, int64_t heads,
                              int64_t nope_dim, int64_t value_dim, float scale, int64_t first_position,
                              DType cache_dtype, const Tensor& out) override;
  void silu_mul(Stream& stream, const Tensor& gate_up, const Tensor& out) override;
  void route(Stream& stream, const Tensor& logits, const Tensor& bias, const RouterParams& params, const Tensor& ids,
             const Tensor& weights) override;
  void sort_by_expert(Stream& stream, const Tensor& ids, int64_t experts, const Tensor& order,
                      const Tensor& offsets) override;
  void expert_mlp(Stream& stream, const Tensor& x, const Tensor& order, const Tensor& offsets, int64_t top_k,
                  const Weight& gate_up, const Weight& down, const Tensor& out) override;
  int64_t expert_row_bytes(RowFormat format, const WeightFormat& weights, int64_t k) const override;
  void encode_expert_rows(Stream& stream, const Tensor& x, const WeightFormat& weights,
                          const EncodedRows& out) override;
  void expert_mlp_encoded(Stream& stream, const EncodedRows& x, const Tensor& order, const Tensor& offsets,
                          int64_t top_k, const Weight& gate_up, const Weight& down, float* out,
                          const Tensor& targets) override;
  void combine(Stream& stream, const Tensor& expert_out, const Tensor& weights, const Tensor& out) override;
  void gather_rows(Stream& stream, const Tensor& x, const Tensor& indices, const Tensor& out) override;
};

// out[n] = Σ_k x[k] * w[matrix, n, k] for every n.
void ref_multiply_row(const float* x, const RefWeight& weight, int64_t matrix, float* out);
float ref_silu(float x);
// The RefWeight behind `weight`; CHECKs that the reference backend packed it.
const RefWeight& ref_weight(const Weight& weight);

}  // namespace tandem::kernels
