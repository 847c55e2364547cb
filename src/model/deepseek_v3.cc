// DeepseekV3ForCausalLM: multi-head latent attention, sigmoid router with correction bias and expert groups
// (arXiv:2412.19437 §2.1), shared experts, the first layers dense.
#include "src/model/family.h"
#include "src/model/mla_attention.h"

namespace tandem::model {
namespace {

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

}  // namespace

const Family kDeepseekV3{"DeepseekV3ForCausalLM", read_config, make_mla_attention};

}  // namespace tandem::model
