// Qwen3MoeForCausalLM: grouped-query attention with a norm on every query and key head, softmax router.
#include <cmath>

#include "src/model/family.h"
#include "src/model/rope.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::Tensor;

void read_config(JsonFields& json, ModelConfig& config) {
  GqaConfig& gqa = config.gqa;
  gqa.kv_heads = json.integer_or("num_key_value_heads", config.num_heads, 1, config.num_heads);
  json.expect(config.num_heads % gqa.kv_heads == 0, "num_key_value_heads",
              fmt::format("must divide num_attention_heads = {}; correct the file", config.num_heads));
  if (!json.has("head_dim")) {
    json.expect(
        config.hidden_size % config.num_heads == 0, "num_attention_heads",
        fmt::format("must divide hidden_size = {} as there is no head_dim; correct the file", config.hidden_size));
  }
  gqa.head_dim = json.integer_or("head_dim", config.hidden_size / config.num_heads, 1, kMaxDim);
  json.expect(gqa.head_dim % 2 == 0, "head_dim", "must be even; correct the file");

  MoeConfig& moe = config.moe;
  moe.num_experts = json.integer("num_experts", 1, kMaxExperts);
  moe.expert_width = json.integer("moe_intermediate_size", 1, kMaxDim);
  moe.router.scoring = kernels::RouterScoring::kSoftmax;
  moe.router.top_k = json.integer("num_experts_per_tok", 1, moe.num_experts);
  moe.router.normalize = json.boolean_or("norm_topk_prob", false);

  const int64_t step = json.integer_or("decoder_sparse_step", 1, 1, kMaxLayers);
  for (int64_t i = 0; i < config.num_layers; ++i) config.layer_is_moe.push_back((i + 1) % step == 0);
  for (const int64_t i : json.integers("mlp_only_layers", 0, config.num_layers - 1)) {
    config.layer_is_moe[static_cast<size_t>(i)] = false;
  }
}

class Qwen3Attention final : public Attention {
 public:
  Qwen3Attention(kernels::Ops& ops, kernels::Stream& stream, const ModelConfig& config)
      : ops_(ops),
        stream_(stream),
        config_(config),
        q_cols_(config.num_heads * config.gqa.head_dim),
        kv_cols_(config.gqa.kv_heads * config.gqa.head_dim),
        layers_(static_cast<size_t>(config.num_layers)) {}

  KvLayout kv_layout() const override {
    KvLayout layout;
    layout.kind = KvKind::kGqa;
    layout.kv_heads = config_.gqa.kv_heads;
    layout.head_dim = config_.gqa.head_dim;
    return layout;
  }

  bool rows_depend_on_role() const override { return false; }

  void list_weights(WeightPlan& plan, int64_t index, const std::string& prefix) override {
    Layer& layer = layers_[static_cast<size_t>(index)];
    const int64_t hidden = config_.hidden_size;
    const int64_t ranks = config_.tensor.size;
    plan.attention_input(layer.q, prefix + "q_proj", ranks * q_cols_, hidden, Split::kRows);
    plan.attention_input(layer.k, prefix + "k_proj", ranks * kv_cols_, hidden, Split::kRows);
    plan.attention_input(layer.v, prefix + "v_proj", ranks * kv_cols_, hidden, Split::kRows);
    plan.linear(layer.o, prefix + "o_proj", hidden, ranks * q_cols_, Split::kColumns);
    plan.vector(layer.q_norm, prefix + "q_norm.weight", config_.gqa.head_dim);
    plan.vector(layer.k_norm, prefix + "k_norm.weight", config_.gqa.head_dim);
  }

  void allocate(const Capacity& capacity) override {
    const DType dtype = ops_.activation_dtype();
    q_ = DeviceTensor(ops_, dtype, capacity.rows, q_cols_);
    k_ = DeviceTensor(ops_, dtype, capacity.rows, kv_cols_);
    v_ = DeviceTensor(ops_, dtype, capacity.rows, kv_cols_);
    attended_ = DeviceTensor(ops_, dtype, capacity.rows, q_cols_);
    const int64_t head_dim = config_.gqa.head_dim;
    rope_ = DeviceTensor(ops_, DType::kF32, capacity.positions, head_dim);
    const std::vector<float> table = rope_table(config_.rope, head_dim, capacity.positions);
    rope_.upload<float>(ops_, stream_, table);
    ops_.synchronize(stream_);
  }

  void write_kv(const Step& step, int64_t index, const Tensor& hidden, const kernels::KvLayerView& cache) override {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    const Tensor q = q_.rows(step.rows);
    const Tensor k = k_.rows(step.rows);
    const Tensor v = v_.rows(step.rows);
    const kernels::Weight* const weights[] = {layer.q.get(), layer.k.get(), layer.v.get()};
    const Tensor outs[] = {q, k, v};
    ops_.linears(stream_, hidden, weights, outs);
    norm_and_rotate(step, layer.q_norm, config_.num_heads, q);
    norm_and_rotate(step, layer.k_norm, config_.gqa.kv_heads, k);
    ops_.write_kv(stream_, k, v, config_.gqa.kv_heads, step.slots, cache);
  }

  void attend(const Step& step, int64_t index, const kernels::KvLayerView& cache, const Tensor& out) override {
    const Tensor attended = attended_.rows(step.rows);
    const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(config_.gqa.head_dim)));
    ops_.attention(stream_, q_.rows(step.rows), config_.num_heads, config_.gqa.kv_heads, scale, step.sequences,
                   step.block_table, cache, attended);
    ops_.linear(stream_, attended, *layers_[static_cast<size_t>(index)].o, out);
  }

 private:
  struct Layer {
    std::unique_ptr<kernels::Weight> q, k, v, o;
    DeviceTensor q_norm, k_norm;
  };

  void norm_and_rotate(const Step& step, const DeviceTensor& norm, int64_t heads, const Tensor& out) {
    const int64_t head_dim = config_.gqa.head_dim;
    ops_.rms_norm(stream_, out, norm.all(), config_.rms_norm_eps, out);
    ops_.rope(stream_, out, heads, head_dim, head_dim, step.positions, rope_.all(), /*interleaved=*/false);
  }

  kernels::Ops& ops_;
  kernels::Stream& stream_;
  const ModelConfig& config_;
  const int64_t q_cols_;
  const int64_t kv_cols_;
  std::vector<Layer> layers_;
  DeviceTensor q_, k_, v_, attended_;  // of the running layer
  DeviceTensor rope_;
};

std::unique_ptr<Attention> make_attention(kernels::Ops& ops, kernels::Stream& stream, const ModelConfig& config) {
  return std::make_unique<Qwen3Attention>(ops, stream, config);
}

}  // namespace

const Family kQwen3Moe{"Qwen3MoeForCausalLM", read_config, make_attention};

}  // namespace tandem::model
