// DeepseekV3ForCausalLM: multi-head latent attention (MLA, arXiv:2405.04434 §2.1), sigmoid router with correction bias
// and expert groups (arXiv:2412.19437 §2.1.2), shared experts, first layers dense.
//
// MLA caches one latent vector per token. Keys and values are W · latent with W = kv_b, per head: rows 0 … N-1 are
// W_UK, rows N … N+V-1 are W_UV. Prompt rows use the expanded form (compute keys and values of the whole context),
// generated rows the absorbed form (move W_UK into the query and W_UV behind the sum); batch.h says why the role
// decides.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "src/model/family.h"
#include "src/model/rope.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::HostMatrix;
using kernels::Tensor;
using kernels::Weight;

// Of the norms inside the LoRA pairs; not in config.json.
constexpr float kLoraNormEps = 1e-6F;
// Expanded keys and values of one sequence are computed for as many heads at a time as fit into this.
constexpr int64_t kExpandedBytes = int64_t{256} << 20;

void read_moe(JsonFields& json, ModelConfig& config) {
  MoeConfig& moe = config.moe;
  moe.num_experts = json.integer("n_routed_experts", 1, kMaxExperts);
  moe.expert_width = json.integer("moe_intermediate_size", 1, kMaxDim);
  moe.shared_width = moe.expert_width * json.integer_or("n_shared_experts", 0, 0, kMaxExperts);
  json.expect(json.text_or("scoring_func", "sigmoid") == "sigmoid", "scoring_func", "must be \"sigmoid\"");
  json.expect(json.text_or("topk_method", "noaux_tc") == "noaux_tc", "topk_method", "must be \"noaux_tc\"");
  moe.has_correction_bias = true;
  kernels::RouterParams& router = moe.router;
  router.scoring = kernels::RouterScoring::kSigmoid;
  router.num_groups = json.integer_or("n_group", 1, 1, moe.num_experts);
  router.top_groups = json.integer_or("topk_group", router.num_groups, 1, router.num_groups);
  const int64_t group_size = moe.num_experts / router.num_groups;
  json.expect(moe.num_experts % router.num_groups == 0, "n_group",
              fmt::format("must divide n_routed_experts = {}; correct the file", moe.num_experts));
  json.expect(router.num_groups == 1 || group_size >= 2, "n_group",
              fmt::format("must leave at least 2 of n_routed_experts = {} per group", moe.num_experts));
  router.top_k = json.integer("num_experts_per_tok", 1, router.top_groups * group_size);
  router.normalize = json.boolean_or("norm_topk_prob", true);
  router.scale = static_cast<float>(json.number_or("routed_scaling_factor", 1, 0, 1e6));

  const int64_t num_dense = json.integer_or("first_k_dense_replace", 0, 0, config.num_layers);
  const int64_t frequency = json.integer_or("moe_layer_freq", 1, 1, kMaxLayers);
  for (int64_t i = 0; i < config.num_layers; ++i) config.layer_is_moe.push_back(i >= num_dense && i % frequency == 0);
}

void read_config(JsonFields& json, ModelConfig& config) {
  MlaConfig& mla = config.mla;
  mla.q_lora_rank = json.integer_or("q_lora_rank", 0, 1, kMaxDim);
  mla.kv_lora_rank = json.integer("kv_lora_rank", 1, kMaxDim);
  mla.nope_dim = json.integer("qk_nope_head_dim", 1, kMaxDim);
  mla.rope_dim = json.integer("qk_rope_head_dim", 2, kMaxDim);
  mla.value_dim = json.integer("v_head_dim", 1, kMaxDim);
  mla.rope_interleaved = json.boolean_or("rope_interleave", true);
  json.expect(mla.rope_dim % 2 == 0, "qk_rope_head_dim", "must be even; correct the file");
  json.expect(json.integer_or("num_key_value_heads", config.num_heads, 1, kMaxHeads) == config.num_heads,
              "num_key_value_heads",
              fmt::format("must equal num_attention_heads = {} in this family; correct the file", config.num_heads));
  read_moe(json, config);
}

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
    if (q_rank > 0) {
      plan.linear(layer.q_a, prefix + "q_a_proj", q_rank, hidden);
      plan.vector(layer.q_a_norm, prefix + "q_a_layernorm.weight", q_rank);
      plan.linear(layer.q, prefix + "q_b_proj", q_cols(), q_rank);
    } else {
      plan.linear(layer.q, prefix + "q_proj", q_cols(), hidden);
    }
    plan.linear(layer.kv_a, prefix + "kv_a_proj_with_mqa", latent_dim_ + rope_dim_, hidden);
    plan.vector(layer.kv_a_norm, prefix + "kv_a_layernorm.weight", latent_dim_);
    plan.derived(prefix + "kv_b_proj", heads_ * (nope_dim_ + value_dim_), latent_dim_,
                 [this, &plan, &layer](std::span<const HostMatrix> kv_b) { pack_kv_b(plan, kv_b[0], layer); });
    plan.linear(layer.o, prefix + "o_proj", hidden, heads_ * value_dim_);
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
    rope_.upload<float>(ops_, stream_, rope_table(config_.rope, rope_dim_, capacity.positions));
    ops_.synchronize(stream_);
  }

  void write_kv(const Step& step, int64_t index, const Tensor& hidden, const kernels::KvLayerView& cache) override {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    Tensor q_input = hidden;
    if (layer.q_a != nullptr) {
      q_input = q_a_.rows(step.rows);
      ops_.linear(stream_, hidden, *layer.q_a, q_input);
      ops_.rms_norm(stream_, q_input, layer.q_a_norm.all(), kLoraNormEps, q_input);
    }
    ops_.linear(stream_, q_input, *layer.q, q_.rows(step.rows));
    rotate(step, heads_, q_pe(q_.rows(step.rows)));

    const Tensor latent_and_pe = latent_and_pe_.rows(step.rows);
    const Tensor latent = latent_and_pe.col_slice(0, latent_dim_);
    const Tensor k_pe = latent_and_pe.col_slice(latent_dim_, rope_dim_);
    ops_.linear(stream_, hidden, *layer.kv_a, latent_and_pe);
    ops_.rms_norm(stream_, latent, layer.kv_a_norm.all(), kLoraNormEps, latent);
    rotate(step, 1, k_pe);
    ops_.write_latent(stream_, latent, k_pe, step.slots, cache);
  }

  void attend(const Step& step, int64_t index, const kernels::KvLayerView& cache, const Tensor& out) override {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    const std::vector<Chunk>& chunks = step.batch->chunks;
    for (size_t i = 0; i < chunks.size();) {
      if (chunks[i].is_prompt) {
        attend_prompt(layer, step, step.sequences[i], cache);
        ++i;
        continue;
      }
      size_t end = i;
      while (end < chunks.size() && !chunks[end].is_prompt) ++end;
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
    std::vector<std::unique_ptr<Weight>> kv_b;  // rows of `heads_per_group` heads each, the last may have fewer
    std::unique_ptr<Weight> absorb_k;           // heads x [L, N]: W_UK transposed
    std::unique_ptr<Weight> absorb_v;           // heads x [V, L]: W_UV
    std::unique_ptr<Weight> o;
  };

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

  void pack_kv_b(WeightPlan& plan, const HostMatrix& kv_b, Layer& layer) {
    const int64_t bytes = kernels::dtype_bytes(kv_b.dtype);
    const auto rows_of = [&](int64_t first, int64_t count) {
      HostMatrix part = kv_b;
      part.data += first * latent_dim_ * bytes;
      part.n = count;
      return part;
    };
    for (int64_t head = 0; head < heads_; head += heads_per_group()) {
      const int64_t count = std::min(heads_per_group(), heads_ - head);
      layer.kv_b.push_back(plan.pack({{rows_of(head * kv_head_cols(), count * kv_head_cols())}}));
    }
    std::vector<std::byte> transposed(static_cast<size_t>(heads_ * nope_dim_ * latent_dim_ * bytes));
    std::byte* next = transposed.data();
    std::vector<HostMatrix> absorb_k;
    std::vector<HostMatrix> absorb_v;
    for (int64_t head = 0; head < heads_; ++head) {
      const HostMatrix w_uk = rows_of(head * kv_head_cols(), nope_dim_);
      absorb_v.push_back(rows_of(head * kv_head_cols() + nope_dim_, value_dim_));
      HostMatrix w_uk_t = w_uk;
      w_uk_t.data = next;
      w_uk_t.n = latent_dim_;
      w_uk_t.k = nope_dim_;
      absorb_k.push_back(w_uk_t);
      for (int64_t i = 0; i < latent_dim_; ++i) {
        for (int64_t j = 0; j < nope_dim_; ++j, next += bytes) {
          std::memcpy(next, w_uk.data + (j * latent_dim_ + i) * bytes, static_cast<size_t>(bytes));
        }
      }
    }
    layer.absorb_k = plan.pack(absorb_k);
    layer.absorb_v = plan.pack(absorb_v);
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
    for (const std::unique_ptr<Weight>& kv_b : layer.kv_b) {
      const int64_t count = kv_b->n() / kv_head_cols();
      const Tensor kv = context_kv_.rows(context).col_slice(0, kv_b->n());
      ops_.linear(stream_, latent, *kv_b, kv);
      ops_.mla_attention_expanded(stream_, q.col_slice(head * q_head_cols(), count * q_head_cols()), kv, k_pe, count,
                                  nope_dim_, value_dim_, scale_, sequence.first_position,
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
    ops_.head_linear(stream_, q, q_head_cols(), *layer.absorb_k, q_latent, latent_dim_);
    ops_.mla_attention_absorbed(stream_, q_latent, q_pe(q), q_head_cols(), heads_, scale_, local, step.block_table,
                                cache, attended_latent);
    ops_.head_linear(stream_, attended_latent, latent_dim_, *layer.absorb_v, attended_.all().row_slice(first_row, rows),
                     value_dim_);
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

std::unique_ptr<Attention> make_attention(kernels::Ops& ops, kernels::Stream& stream, const ModelConfig& config) {
  return std::make_unique<MlaAttention>(ops, stream, config);
}

}  // namespace

const Family kDeepseekV3{"DeepseekV3ForCausalLM", read_config, make_attention};

}  // namespace tandem::model
