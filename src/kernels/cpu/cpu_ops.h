// The backend for x86 hosts: work split over a thread pool, inner loops by the table of one instruction set.
#pragma once

#include "src/kernels/cpu/gemm.h"
#include "src/kernels/cpu/isa.h"
#include "src/kernels/cpu/scratch.h"
#include "src/kernels/cpu/thread_pool.h"
#include "src/kernels/host_ops.h"

namespace tandem::kernels::cpu {

class CpuOps final : public HostOps {
 public:
  CpuOps(const Isa& isa, int num_threads) : isa_(isa), pool_(num_threads) {}

  std::string name() const override { return isa_.name; }
  int num_threads() const override { return pool_.num_threads(); }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<CpuStream>(); }

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

 private:
  // Input, as the product takes it, and output of each place in the order of the experts.
  struct ExpertPlaces {
    std::vector<const void*> inputs;
    std::vector<float*> outputs;
  };
  void multiply_experts(CpuStream& own, const ExpertPlaces& places, const Tensor& offsets, const Weight& gate_up,
                        const Weight& down);

  // Calls body(row) for every row, on several threads if `elements_per_row` make it worth it.
  template <typename Body>
  void for_each_row(int64_t rows, int64_t elements_per_row, const Body& body) {
    constexpr int64_t kInlineElements = 32 * 1024;  // about 10 µs of one thread
    constexpr int64_t kElementsPerTask = 16 * 1024;
    if (rows * elements_per_row < kInlineElements) {
      for (int64_t row = 0; row < rows; ++row) body(row);
      return;
    }
    const int64_t rows_per_task = elements_per_row >= kElementsPerTask ? 1 : kElementsPerTask / elements_per_row;
    pool_.run((rows + rows_per_task - 1) / rows_per_task, [&](int64_t task, int /*worker*/) {
      const int64_t end = rows < (task + 1) * rows_per_task ? rows : (task + 1) * rows_per_task;
      for (int64_t row = task * rows_per_task; row < end; ++row) body(row);
    });
  }

  const Isa& isa_;
  ThreadPool pool_;
};

}  // namespace tandem::kernels::cpu
