#include "src/model/config.h"

#include "src/model/test_support.h"

namespace tandem::model {
namespace {

constexpr char kDeepseek[] = R"({
  "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
  "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
  "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
  "norm_topk_prob": true, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
  "first_k_dense_replace": 1, "moe_layer_freq": 2, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 12,
  "qk_rope_head_dim": 8, "v_head_dim": 10, "hidden_act": "silu", "rms_norm_eps": 1e-05, "rope_theta": 10000,
  "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                   "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5},
  "max_position_embeddings": 2560, "attention_bias": false, "tie_word_embeddings": false, "eos_token_id": [5, 1],
  "auto_map": {"AutoModel": "evil.py"}, "torch_dtype": "bfloat16",
  "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 64],
                          "modules_to_not_convert": ["lm_head", "model.layers.1.mlp"]}})";

constexpr char kQwen[] = R"({
  "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 128, "hidden_size": 60, "intermediate_size": 96,
  "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
  "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "decoder_sparse_step": 2, "mlp_only_layers": [3],
  "rope_parameters": {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0,
                      "original_max_position_embeddings": 32768},
  "sliding_window": null, "use_sliding_window": false, "max_position_embeddings": 512, "eos_token_id": 1,
  "dtype": "bfloat16"})";

ModelConfig must_parse(const std::string& json, const std::string& generation = "") {
  const TempDir folder;
  folder.write("config.json", json);
  if (!generation.empty()) folder.write("generation_config.json", generation);
  return load_config(folder.path()).value();
}

TEST(Config, ReadsDeepseek) {
  const ModelConfig config = must_parse(kDeepseek);
  EXPECT_EQ(config.architecture, "DeepseekV3ForCausalLM");
  EXPECT_EQ(config.layer_is_moe, (std::vector<bool>{false, false, true, false}));
  EXPECT_EQ(config.mla.q_lora_rank, 32);
  EXPECT_EQ(config.mla.value_dim, 10);
  EXPECT_TRUE(config.mla.rope_interleaved);
  EXPECT_EQ(config.moe.shared_width, 64);
  EXPECT_EQ(config.moe.router.num_groups, 4);
  EXPECT_EQ(config.moe.router.scale, 2.5F);
  EXPECT_EQ(config.rms_norm_eps, 1e-5F);
  EXPECT_TRUE(config.rope.is_yarn);
  EXPECT_EQ(config.rope.theta, 10000);
  EXPECT_EQ(config.rope.factor, 40);
  EXPECT_EQ(config.rope.mscale_all_dim, 0.5);
  EXPECT_EQ(config.generation.eos_token_ids, (std::vector<TokenId>{1, 5}));
  EXPECT_EQ(config.quant.rules.at(0).scheme.block_k, 64);
  EXPECT_EQ(config.quant.scheme_of("lm_head"), nullptr);
  EXPECT_EQ(config.quant.scheme_of("model.layers.1.mlp.gate"), nullptr);
  EXPECT_NE(config.quant.scheme_of("model.layers.11.mlp.gate"), nullptr);
  EXPECT_EQ(must_parse(replaced(kDeepseek, R"("q_lora_rank": 32)", R"("q_lora_rank": null)")).mla.q_lora_rank, 0);
}

TEST(Config, ReadsQwen) {
  const ModelConfig config = must_parse(kQwen);
  EXPECT_EQ(config.layer_is_moe, (std::vector<bool>{false, true, false, false}));
  EXPECT_EQ(config.gqa.head_dim, 16);
  EXPECT_EQ(config.rope.theta, 500000);
  EXPECT_EQ(config.rope.factor, 4);
  EXPECT_FALSE(config.moe.router.normalize);
  EXPECT_EQ(config.quant.method, QuantMethod::kNone);
  const std::string old_spelling =
      replaced(kQwen, R"("rope_parameters": {"rope_type": "yarn", "rope_theta": 500000.0,)",
               R"("rope_theta": 500000.0, "rope_scaling": {"rope_type": "yarn",)");
  EXPECT_EQ(must_parse(old_spelling).rope.theta, 500000);
  EXPECT_EQ(must_parse(old_spelling).rope.original_max_position, 32768);
}

TEST(Config, TakesGenerationDefaults) {
  const GenerationConfig generation =
      must_parse(kQwen, R"({"eos_token_id": [3, 1], "temperature": 0.6, "top_p": 0.95, "top_k": 20})").generation;
  EXPECT_EQ(generation.eos_token_ids, (std::vector<TokenId>{1, 3}));
  EXPECT_EQ(generation.temperature, 0.6);
  EXPECT_EQ(generation.top_p, 0.95);
  EXPECT_EQ(generation.top_k, 20);
  EXPECT_FALSE(must_parse(kQwen).generation.temperature.has_value());
}

TEST(Config, CanonicalTextIgnoresToolKeysOnly) {
  const std::string text = must_parse(kQwen).canonical_json;
  EXPECT_EQ(must_parse(replaced(kQwen, R"("dtype": "bfloat16")", R"("transformers_version": "9")")).canonical_json,
            text);
  EXPECT_NE(must_parse(replaced(kQwen, R"("head_dim": 16)", R"("head_dim": 18)")).canonical_json, text);
}

struct BadConfig {
  const char* base;
  const char* from;
  const char* to;
  const char* message;  // a part of it
};

TEST(Config, RefusesBadFields) {
  const BadConfig cases[] = {
      {kDeepseek, "{\n", "[", "not valid JSON"},
      {kDeepseek, R"("vocab_size": 128,)", R"("vocab_size": 128, "vocab_size": 128,)",
       "has the key \"vocab_size\" twice"},
      {kDeepseek, "DeepseekV3ForCausalLM", "LlamaForCausalLM",
       "[\"LlamaForCausalLM\"], must be one of the known architectures: DeepseekV3ForCausalLM, Qwen3MoeForCausalLM"},
      {kDeepseek, R"("architectures": ["DeepseekV3ForCausalLM"],)", "", "architectures is missing"},
      {kDeepseek, R"("vocab_size": 128)", R"("vocab_size": 0)", "vocab_size is 0, must be an integer from 2 to"},
      {kDeepseek, R"("hidden_size": 64)", R"("hidden_size": -64)", "hidden_size is -64"},
      {kDeepseek, R"("hidden_size": 64)", R"("hidden_size": 2147483648)", "hidden_size is 2147483648, must be"},
      {kDeepseek, R"("hidden_size": 64)", R"("hidden_size": 1e999)", "not valid JSON"},
      {kDeepseek, R"("hidden_size": 64)", R"("hidden_size": 18446744073709551615)",
       "hidden_size is 18446744073709551615"},
      {kDeepseek, R"("hidden_size": 64)", R"("hidden_size": 64.5)", "hidden_size is 64.5"},
      {kDeepseek, R"("hidden_size": 64)", R"("hidden_size": "64")", "hidden_size is \"64\""},
      {kDeepseek, R"("hidden_size": 64,)", "", "hidden_size is missing"},
      {kDeepseek, R"("num_hidden_layers": 4)", R"("num_hidden_layers": 100000)", "num_hidden_layers is 100000"},
      {kDeepseek, R"("num_key_value_heads": 4)", R"("num_key_value_heads": 2)", "must equal num_attention_heads = 4"},
      {kDeepseek, R"("n_group": 4)", R"("n_group": 3)", "n_group is 3, must divide n_routed_experts = 8"},
      {kDeepseek, R"("n_group": 4)", R"("n_group": 8)", "n_group is 8, must leave at least 2"},
      {kDeepseek, R"("topk_group": 2)", R"("topk_group": 5)", "topk_group is 5, must be an integer from 1 to 4"},
      {kDeepseek, R"("num_experts_per_tok": 3)", R"("num_experts_per_tok": 5)", "num_experts_per_tok is 5"},
      {kDeepseek, R"("scoring_func": "sigmoid")", R"("scoring_func": "softmax")", "scoring_func is \"softmax\""},
      {kDeepseek, R"("topk_method": "noaux_tc")", R"("topk_method": "greedy")", "topk_method is \"greedy\""},
      {kDeepseek, R"("qk_rope_head_dim": 8)", R"("qk_rope_head_dim": 7)", "qk_rope_head_dim is 7, must be even"},
      {kDeepseek, R"("first_k_dense_replace": 1)", R"("first_k_dense_replace": 5)", "first_k_dense_replace is 5"},
      {kDeepseek, R"("factor": 40)", R"("factor": 0)", "rope_scaling.factor is 0, must be a number from 1"},
      {kDeepseek, R"("factor": 40)", R"("factor": NaN)", "not valid JSON"},
      {kDeepseek, R"("factor": 40)", R"("factor": null)", "rope_scaling.factor is missing"},
      {kDeepseek, R"("type": "yarn")", R"("type": "longrope")", "rope_scaling.type is \"longrope\""},
      {kDeepseek, R"("rope_theta": 10000)", R"("rope_theta": 0)", "rope_theta is 0"},
      {kDeepseek, R"("rms_norm_eps": 1e-05)", R"("rms_norm_eps": 0)", "rms_norm_eps is 0"},
      {kDeepseek, R"("hidden_act": "silu")", R"("hidden_act": "gelu")", "hidden_act is \"gelu\""},
      {kDeepseek, R"("attention_bias": false)", R"("attention_bias": true)", "attention_bias is true"},
      {kDeepseek, R"("attention_bias": false)", R"("attention_bias": 0)", "attention_bias is 0, must be true or false"},
      {kDeepseek, R"("eos_token_id": [5, 1])", R"("eos_token_id": [5, 128])", "eos_token_id is [5,128], must be"},
      {kDeepseek, R"("eos_token_id": [5, 1])", R"("eos_token_id": -1)", "eos_token_id is -1"},
      {kDeepseek, R"("torch_dtype": "bfloat16")", R"("torch_dtype": "int8")", "torch_dtype is \"int8\""},
      {kDeepseek, R"("quant_method": "fp8")", R"("quant_method": "exl2")",
       "quantization_config.quant_method is \"exl2\""},
      {kDeepseek, R"("fmt": "e4m3")", R"("fmt": "e5m2")", "quantization_config.fmt is \"e5m2\""},
      {kDeepseek, R"("weight_block_size": [128, 64],)", "", "quantization_config.weight_block_size is missing"},
      {kDeepseek, R"([128, 64])", R"([128, 0])", "weight_block_size is [128,0]"},
      {kDeepseek, R"(["lm_head", "model.layers.1.mlp"])", R"([1])", "modules_to_not_convert is [1], must be a list"},
      {kQwen, R"("num_key_value_heads": 2)", R"("num_key_value_heads": 4)", "must divide num_attention_heads = 6"},
      {kQwen, R"("num_key_value_heads": 2)", R"("num_key_value_heads": 12)", "num_key_value_heads is 12"},
      {kQwen, R"("head_dim": 16)", R"("head_dim": 15)", "head_dim is 15, must be even"},
      {kQwen, R"("hidden_size": 60, "intermediate_size": 96,)",
       R"("hidden_size": 61, "intermediate_size": 96, "head_dim": null,)", "has the key \"head_dim\" twice"},
      {kQwen, R"("num_experts_per_tok": 3)", R"("num_experts_per_tok": 9)", "must be an integer from 1 to 8"},
      {kQwen, R"("mlp_only_layers": [3])", R"("mlp_only_layers": [4])", "mlp_only_layers is [4]"},
      {kQwen, R"("use_sliding_window": false)", R"("use_sliding_window": true)", "use_sliding_window is true"},
      {kQwen, R"("rope_type": "yarn")", R"("rope_type": "dynamic")", "rope_parameters.rope_type is \"dynamic\""},
      {kQwen, R"("eos_token_id": 1)", R"("eos_token_id": 128)", "eos_token_id is 128"},
  };
  for (const BadConfig& bad : cases) {
    const TempDir folder;
    const std::string path = folder.write("config.json", replaced(bad.base, bad.from, bad.to));
    const Result<ModelConfig> config = load_config(folder.path());
    ASSERT_FALSE(config.ok()) << bad.to;
    EXPECT_THAT(config.error().message, testing::HasSubstr(bad.message));
    EXPECT_THAT(config.error().message, testing::StartsWith(path + ":"));
    EXPECT_EQ(config.error().message.find('\n'), std::string::npos);
  }
}

TEST(Config, RefusesHeadsThatDoNotDivideTheHiddenSize) {
  const TempDir folder;
  folder.write("config.json",
               replaced(replaced(kQwen, R"("head_dim": 16,)", ""), R"("hidden_size": 60)", R"("hidden_size": 61)"));
  EXPECT_THAT(load_config(folder.path()).error().message, testing::HasSubstr("must divide hidden_size = 61"));
}

TEST(Config, RefusesBadGenerationConfig) {
  const TempDir folder;
  folder.write("config.json", kQwen);
  const std::pair<const char*, const char*> cases[] = {
      {R"({"eos_token_id": 128})", "eos_token_id is 128"},
      {R"({"temperature": -1})", "temperature is -1"},
      {R"({"top_p": 0})", "top_p is 0"},
      {R"({"top_k": 1.5})", "top_k is 1.5"},
      {"[]", "holds array, must be a JSON object"},
      {"", "not valid JSON"},
  };
  for (const auto& [text, message] : cases) {
    folder.write("generation_config.json", text);
    EXPECT_THAT(load_config(folder.path()).error().message, testing::HasSubstr(message));
  }
}

// Whatever a config says, it is read or refused.
TEST(Config, SurvivesDamagedFiles) {
  constexpr int kIterations = 1000;
  const uint64_t seed = std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  const TempDir folder;
  int refused = 0;
  for (int i = 0; i < kIterations; ++i) {
    std::string text = i % 2 == 0 ? kDeepseek : kQwen;
    for (uint64_t changes = 1 + random() % 3; changes > 0; --changes) {
      constexpr std::string_view kBytes = "0123456789-.eE[]{}\",:";
      const size_t at = text.find_first_of("0123456789[{,", random() % text.size());
      if (at != std::string::npos) text[at] = kBytes[random() % kBytes.size()];
    }
    folder.write("config.json", text);
    refused += load_config(folder.path()).ok() ? 0 : 1;
  }
  EXPECT_GT(refused, kIterations / 4);
  EXPECT_LT(refused, kIterations);
}

TEST(Config, RefusesAFileOfWeights) {
  const TempDir folder;
  folder.write("model.safetensors", "");
  const std::string path = folder.path() + "/model.safetensors";
  EXPECT_THAT(load_config(path).error().message, testing::HasSubstr(path + ": is a file, and a model is a folder"));
}

TEST(Config, RefusesMissingAndMonstrousFiles) {
  const TempDir folder;
  EXPECT_THAT(load_config(folder.path()).error().message, testing::HasSubstr("config.json: cannot be read"));
  std::filesystem::create_directory(folder.path() + "/config.json");
  EXPECT_THAT(load_config(folder.path()).error().message, testing::HasSubstr("not a regular file"));
  std::filesystem::remove(folder.path() + "/config.json");
  folder.write("config.json", std::string(17 << 20, ' '));
  EXPECT_THAT(load_config(folder.path()).error().message, testing::HasSubstr("at most"));
  folder.write("config.json", std::string(100'000, '['));
  EXPECT_FALSE(load_config(folder.path()).ok());
  folder.write("config.json", R"({"a":)" + std::string(40, '[') + std::string(40, ']') + "}");
  EXPECT_THAT(load_config(folder.path()).error().message, testing::HasSubstr("nested deeper"));
}

}  // namespace
}  // namespace tandem::model
