// MLA caches one latent vector per token; keys and values are kv_b · latent. Prompt rows use the expanded form (compute
// keys and values of the whole context), generated rows the absorbed form (move the key half of kv_b into the query and
// the value half behind the sum). batch.h says why the role of a token decides.
#include "src/model/mla_attention.h"

#include <algorithm>
#include <cmath>

#include "src/model/mla_kv_b.h"
#include "src/model/rope.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::Tensor;
using kernels::Weight;

// Of the norms inside the LoRA pairs; not in config.json.
constexpr float kLoraNormEps = 1e-6F;
// Expanded keys and values of one sequence are computed for as many heads at a time as fit into this.
constexpr int64_t kExpandedBytes = int64_t{256} << 20;

class MlaAttention final : public Attention {
 public:
  MlaAttention(kernels::Ops& ops, kernels::Stream& stream, const ModelConfig& config)
      : ops_(ops),
        stream_(stream),
        config_(config),
        heads_(config.num_heads),
        latent_dim_(config.mla.kv_lora_rank),
        nope_dim_(config.mla.nope_dim),
        rope_dim_(config.mla.rope_dim),
        value_dim_(config.mla.value_dim),
        layers_(static_cast<size_t>(config.num_layers)) {
    const double mscale = config.rope.is_yarn ? yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) : 1;
    scale_ = static_cast<float>(mscale * mscale / std::sqrt(static_cast<double>(nope_dim_ + rope_dim_)));
  }

  KvLayout kv_layout() const override {
    KvLayout layout;
    layout.kind = KvKind::kMla;
    layout.latent_dim = latent_dim_;
    layout.rope_dim = rope_dim_;
    return layout;
  }

  bool rows_depend_on_role() const override { return true; }

  void list_weights(WeightPlan& plan, int64_t index, const std::string& prefix) override {
    Layer& layer = layers_[static_cast<size_t>(index)];
    const int64_t hidden = config_.hidden_size;
    const int64_t q_rank = config_.mla.q_lora_rank;
    const int64_t ranks = config_.tensor.size;
    if (q_rank > 0) {
      plan.attention_input(layer.q_a, prefix + "q_a_proj", q_rank, hidden);
      plan.vector(layer.q_a_norm, prefix + "q_a_layernorm.weight", q_rank);
      plan.attention_input(layer.q, prefix + "q_b_proj", ranks * q_cols(), q_rank, Split::kRows);
    } else {
      plan.attention_input(layer.q, prefix + "q_proj", ranks * q_cols(), hidden, Split::kRows);
    }
    plan.attention_input(layer.kv_a, prefix + "kv_a_proj_with_mqa", latent_dim_ + rope_dim_, hidden);
    plan.vector(layer.kv_a_norm, prefix + "kv_a_layernorm.weight", latent_dim_);
    plan.derived(prefix + "kv_b_proj", ranks * heads_ * kv_head_cols(), latent_dim_,
                 [this, &plan, &layer](std::span<const kernels::HostMatrix> kv_b) {
                   const MlaKvBShape shape{heads_, heads_per_group(), nope_dim_, value_dim_};
                   layer.kv_b = pack_mla_kv_b(plan, own_heads(kv_b[0]), shape);
                 });
    plan.linear(layer.o, prefix + "o_proj", hidden, ranks * heads_ * value_dim_, Split::kColumns);
  }

  void allocate(const Capacity& capacity) override {
    const DType dtype = ops_.activation_dtype();
    q_a_ = DeviceTensor(ops_, dtype, capacity.rows, config_.mla.q_lora_rank);
    q_ = DeviceTensor(ops_, dtype, capacity.rows, q_cols());
    latent_and_pe_ = DeviceTensor(ops_, dtype, capacity.rows, latent_dim_ + rope_dim_);
    q_latent_ = DeviceTensor(ops_, dtype, capacity.rows, heads_ * latent_dim_);
    attended_latent_ = DeviceTensor(ops_, dtype, capacity.rows, heads_ * latent_dim_);
    attended_ = DeviceTensor(ops_, dtype, capacity.rows, heads_ * value_dim_);
    rope_ = DeviceTensor(ops_, DType::kF32, capacity.positions, rope_dim_);
    const std::vector<float> table = rope_table(config_.rope, rope_dim_, capacity.positions);
    rope_.upload<float>(ops_, stream_, table);
    ops_.synchronize(stream_);
  }

  void write_kv(const Step& step, int64_t index, const Tensor& hidden, const kernels::KvLayerView& cache) override {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    const Tensor q = q_.rows(step.rows);
    const Tensor latent_and_pe = latent_and_pe_.rows(step.rows);
    if (layer.q_a != nullptr) {
      const Tensor q_a = q_a_.rows(step.rows);
      project(hidden, *layer.q_a, q_a, *layer.kv_a, latent_and_pe);
      ops_.rms_norm(stream_, q_a, layer.q_a_norm.all(), kLoraNormEps, q_a);
      ops_.linear(stream_, q_a, *layer.q, q);
    } else {
      project(hidden, *layer.q, q, *layer.kv_a, latent_and_pe);
    }
    rotate(step, heads_, q_pe(q));

    const Tensor latent = latent_and_pe.col_slice(0, latent_dim_);
    const Tensor k_pe = latent_and_pe.col_slice(latent_dim_, rope_dim_);
    ops_.rms_norm(stream_, latent, layer.kv_a_norm.all(), kLoraNormEps, latent);
    rotate(step, 1, k_pe);
    ops_.write_latent(stream_, latent, k_pe, step.slots, cache);
  }

  void attend(const Step& step, int64_t index, const kernels::KvLayerView& cache, const Tensor& out) override {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    for (size_t i = 0; i < step.sequences.size();) {
      if (step.is_prompt[i]) {
        attend_prompt(layer, step, step.sequences[i], cache);
        ++i;
        continue;
      }
      size_t end = i;
      while (end < step.sequences.size() && !step.is_prompt[end]) ++end;
      attend_generated(layer, step, std::span(step.sequences).subspan(i, end - i), cache);
      i = end;
    }
    ops_.linear(stream_, attended_.rows(step.rows), *layer.o, out);
  }

 private:
  struct Layer {
    std::unique_ptr<Weight> q_a;  // null without q LoRA
    DeviceTensor q_a_norm;
    std::unique_ptr<Weight> q;
    std::unique_ptr<Weight> kv_a;
    DeviceTensor kv_a_norm;
    MlaKvB kv_b;
    std::unique_ptr<Weight> o;
  };

  // The rows of kv_b that belong to this rank's heads.
  kernels::HostMatrix own_heads(const kernels::HostMatrix& kv_b) const {
    kernels::HostMatrix own = kv_b;
    own.n = heads_ * kv_head_cols();
    own.data += config_.tensor.rank * own.n * kv_b.k * kernels::dtype_bytes(kv_b.dtype);
    return own;
  }

  void project(const Tensor& hidden, const Weight& first, const Tensor& first_out, const Weight& second,
               const Tensor& second_out) {
    const Weight* const weights[] = {&first, &second};
    const Tensor outs[] = {first_out, second_out};
    ops_.linears(stream_, hidden, weights, outs);
  }
  int64_t q_head_cols() const { return nope_dim_ + rope_dim_; }
  int64_t q_cols() const { return heads_ * q_head_cols(); }
  int64_t kv_head_cols() const { return nope_dim_ + value_dim_; }
  // The columns from the first head's rope part to the last head's; head stride q_head_cols().
  Tensor q_pe(const Tensor& q) const { return q.col_slice(nope_dim_, q_cols() - nope_dim_); }

  // Fixed by the config alone, so that every worker of a model splits alike.
  int64_t heads_per_group() const {
    const int64_t bytes_per_head = config_.max_positions * kv_head_cols() * int64_t{sizeof(float)};
    return std::clamp<int64_t>(kExpandedBytes / bytes_per_head, 1, heads_);
  }

  void rotate(const Step& step, int64_t heads, const Tensor& x) {
    ops_.rope(stream_, x, heads, q_head_cols(), rope_dim_, step.positions, rope_.all(), config_.mla.rope_interleaved);
  }

  // Expanded form, for the rows of one prompt chunk.
  void attend_prompt(const Layer& layer, const Step& step, const kernels::SequenceRows& sequence,
                     const kernels::KvLayerView& cache) {
    const int64_t context = int64_t{sequence.first_position} + sequence.num_rows;
    reserve_context(context);
    const Tensor latent = context_latent_.rows(context);
    const Tensor k_pe = context_pe_.rows(context);
    const Tensor q = q_.all().row_slice(sequence.first_row, sequence.num_rows);
    const Tensor attended = attended_.all().row_slice(sequence.first_row, sequence.num_rows);
    ops_.gather_latent(stream_, sequence, step.block_table, cache, latent, k_pe);
    int64_t head = 0;
    for (const std::unique_ptr<Weight>& kv_b : layer.kv_b.expand) {
      const int64_t count = kv_b->n() / kv_head_cols();
      const Tensor kv = context_kv_.rows(context).col_slice(0, kv_b->n());
      ops_.linear(stream_, latent, *kv_b, kv);
      ops_.mla_attention_expanded(stream_, q.col_slice(head * q_head_cols(), count * q_head_cols()), kv, k_pe, count,
                                  nope_dim_, value_dim_, scale_, sequence.first_position, cache.dtype,
                                  attended.col_slice(head * value_dim_, count * value_dim_));
      head += count;
    }
  }

  // Absorbed form, for the rows of consecutive chunks of generated tokens.
  void attend_generated(const Layer& layer, const Step& step, std::span<const kernels::SequenceRows> sequences,
                        const kernels::KvLayerView& cache) {
    const int64_t first_row = sequences.front().first_row;
    const int64_t rows = int64_t{sequences.back().first_row} + sequences.back().num_rows - first_row;
    std::vector<kernels::SequenceRows> local(sequences.begin(), sequences.end());
    for (kernels::SequenceRows& sequence : local) sequence.first_row -= static_cast<int32_t>(first_row);
    const Tensor q = q_.all().row_slice(first_row, rows);
    const Tensor q_latent = q_latent_.rows(rows);
    const Tensor attended_latent = attended_latent_.rows(rows);
    ops_.head_linear(stream_, q, q_head_cols(), *layer.kv_b.absorb_k, q_latent, latent_dim_);
    ops_.mla_attention_absorbed(stream_, q_latent, q_pe(q), q_head_cols(), heads_, scale_, local, step.block_table,
                                cache, attended_latent);
    ops_.head_linear(stream_, attended_latent, latent_dim_, *layer.kv_b.absorb_v,
                     attended_.all().row_slice(first_row, rows), value_dim_);
  }

  // Grows the scratch for one sequence's whole context, by doubling.
  void reserve_context(int64_t positions) {
    const int64_t present = context_latent_.all().rows;
    if (positions <= present) return;
    const int64_t capacity = std::min(std::max(positions, 2 * present), rope_.all().rows);
    ops_.synchronize(stream_);
    const DType dtype = ops_.activation_dtype();
    context_latent_ = DeviceTensor(ops_, dtype, capacity, latent_dim_);
    context_pe_ = DeviceTensor(ops_, dtype, capacity, rope_dim_);
    context_kv_ = DeviceTensor(ops_, dtype, capacity, heads_per_group() * kv_head_cols());
  }

  kernels::Ops& ops_;
  kernels::Stream& stream_;
  const ModelConfig& config_;
  const int64_t heads_;
  const int64_t latent_dim_;  // L
  const int64_t nope_dim_;    // N
  const int64_t rope_dim_;    // R
  const int64_t value_dim_;   // V
  float scale_ = 0;
  std::vector<Layer> layers_;
  DeviceTensor rope_;
  // Of the running layer:
  DeviceTensor q_a_;
  DeviceTensor q_;                // [T, heads (N + R)]
  DeviceTensor latent_and_pe_;    // [T, L + R]
  DeviceTensor q_latent_;         // [T, heads L]
  DeviceTensor attended_latent_;  // [T, heads L]
  DeviceTensor attended_;         // [T, heads V]
  // Of the running prompt chunk's sequence:
  DeviceTensor context_latent_;  // [n, L]
  DeviceTensor context_pe_;      // [n, R]
  DeviceTensor context_kv_;      // [n, heads_per_group (N + V)]
};

}  // namespace

std::unique_ptr<Attention> make_mla_attention(kernels::Ops& ops, kernels::Stream& stream, const ModelConfig& config) {
  return std::make_unique<MlaAttention>(ops, stream, config);
}

}  // namespace tandem::model
