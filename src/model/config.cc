#include "src/model/config.h"

#include <sys/stat.h>

#include <algorithm>

#include "src/model/family.h"

namespace tandem::model {
namespace {

constexpr int64_t kMaxConfigBytes = int64_t{16} << 20;
constexpr std::string_view kUnsupported = "which this build does not support; use a model without it";

// Keys that name tools or paths, so that two copies of one model may differ in them.
constexpr std::string_view kIgnoredKeys[] = {
    "transformers_version", "_name_or_path", "auto_map", "torch_dtype", "dtype", "use_cache", "_attn_implementation"};

bool is_file(const std::string& path) {
  struct stat info {};
  return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

std::string known_architectures() {
  std::string names;
  for (const Family* family : families()) {
    names += fmt::format("{}{}", names.empty() ? "" : ", ", family->architecture);
  }
  return names;
}

const Family* read_architecture(JsonFields& json) {
  const std::vector<std::string> names = json.texts("architectures");
  const Family* family = names.size() == 1 ? find_family(names[0]) : nullptr;
  json.expect(
      family != nullptr, "architectures",
      fmt::format("must be one of the known architectures: {}; use a model of one of these", known_architectures()));
  return family;
}

void add_eos(JsonFields& json, int64_t vocab_size, GenerationConfig& generation) {
  for (const int64_t id : json.integers("eos_token_id", 0, vocab_size - 1)) {
    generation.eos_token_ids.push_back(static_cast<TokenId>(id));
  }
  std::sort(generation.eos_token_ids.begin(), generation.eos_token_ids.end());
  generation.eos_token_ids.erase(std::unique(generation.eos_token_ids.begin(), generation.eos_token_ids.end()),
                                 generation.eos_token_ids.end());
}

Status read_generation(const std::string& path, int64_t vocab_size, GenerationConfig& generation) {
  if (!is_file(path)) return {};
  TANDEM_ASSIGN(JsonFields json, JsonFields::read(path, kMaxConfigBytes));
  add_eos(json, vocab_size, generation);
  if (json.has("temperature")) generation.temperature = json.number("temperature", 0, 100);
  if (json.has("top_p")) {
    generation.top_p = json.number("top_p", 0, 1);
    json.expect(*generation.top_p > 0, "top_p", "must be above 0; correct the file");
  }
  if (json.has("top_k")) generation.top_k = std::max<int64_t>(0, json.integer("top_k", -1, kMaxVocab));
  return json.status();
}

// Fields that every family names alike, and features that none supports.
void read_common(JsonFields& json, ModelConfig& config) {
  config.vocab_size = json.integer("vocab_size", 2, kMaxVocab);
  config.hidden_size = json.integer("hidden_size", 1, kMaxDim);
  config.num_layers = json.integer("num_hidden_layers", 1, kMaxLayers);
  config.num_heads = json.integer("num_attention_heads", 1, kMaxHeads);
  config.dense_width = json.integer("intermediate_size", 1, kMaxDim);
  config.max_positions = json.integer("max_position_embeddings", 1, kMaxPositions);
  config.rms_norm_eps = static_cast<float>(json.number_or("rms_norm_eps", 1e-6, 1e-20, 1));
  config.tied_embeddings = json.boolean_or("tie_word_embeddings", false);
  config.rope = read_rope(json);
  config.quant = read_quant_config(json);
  json.expect(json.text_or("hidden_act", "silu") == "silu", "hidden_act",
              "must be \"silu\"; other activations are not supported");
  json.expect(!json.boolean_or("attention_bias", false), "attention_bias", kUnsupported);
  json.expect(!json.boolean_or("mlp_bias", false), "mlp_bias", kUnsupported);
  json.expect(!json.boolean_or("use_sliding_window", false), "use_sliding_window", kUnsupported);
  for (const std::string& type : json.texts("layer_types")) {
    json.expect(type == "full_attention", "layer_types", "must all be \"full_attention\"; use a model without others");
  }
  const std::string dtype = json.text_or("dtype", json.text_or("torch_dtype", "bfloat16"));
  json.expect(dtype == "bfloat16" || dtype == "float32" || dtype == "float16",
              json.has("dtype") ? "dtype" : "torch_dtype", "must be bfloat16, float16 or float32; correct the file");
}

}  // namespace

// Newer files have one `rope_parameters`; older ones `rope_theta` and, if scaled, `rope_scaling` with "type" or
// "rope_type".
RopeConfig read_rope(JsonFields& json) {
  constexpr double kMaxTheta = 1e12;
  RopeConfig rope;
  const bool is_new = json.has("rope_parameters");
  const bool is_scaled = is_new || json.has("rope_scaling");
  JsonFields fields = json.object(is_new ? "rope_parameters" : "rope_scaling");
  JsonFields& theta_owner = fields.has("rope_theta") ? fields : json;
  rope.theta = theta_owner.number_or("rope_theta", 10000, 1, kMaxTheta);
  theta_owner.expect(rope.theta > 1, "rope_theta", "must be above 1; correct the file");
  json.expect(json.number_or("partial_rotary_factor", 1, 0, 1) == 1, "partial_rotary_factor", kUnsupported);
  if (!is_scaled) return rope;
  const char* type_key = fields.has("rope_type") ? "rope_type" : "type";
  const std::string type = fields.text_or(type_key, is_new ? "default" : "");
  if (type == "default") return rope;
  if (type != "yarn") {
    fields.fail(type_key, "must be \"default\" or \"yarn\"; other position scalings are not supported");
    return rope;
  }
  rope.is_yarn = true;
  rope.factor = fields.number("factor", 1, 1e6);
  rope.original_max_position = fields.integer("original_max_position_embeddings", 1, kMaxPositions);
  rope.beta_fast = fields.number_or("beta_fast", 32, 1e-3, 1e6);
  rope.beta_slow = fields.number_or("beta_slow", 1, 1e-3, 1e6);
  fields.expect(rope.beta_fast >= rope.beta_slow, "beta_fast", "must be at least beta_slow; correct the file");
  rope.truncate = fields.boolean_or("truncate", true);
  rope.mscale = fields.number_or("mscale", 1, 0, 1e3);
  rope.mscale_all_dim = fields.number_or("mscale_all_dim", 0, 0, 1e3);
  if (fields.has("attention_factor")) {
    rope.attention_factor = fields.number("attention_factor", 0, 1e3);
    fields.expect(*rope.attention_factor > 0, "attention_factor", "must be above 0; correct the file");
  }
  return rope;
}

Result<ModelConfig> load_config(const std::string& path) {
  ModelConfig config;
  if (is_file(path) && !path.ends_with(".json")) {
    return invalid_argument("model", "{}: is a file, and a model is a folder with config.json, *.safetensors and "
                                     "tokenizer.json; give the folder",
                            printable(path));
  }
  config.path = is_file(path) ? path : path + "/config.json";
  TANDEM_ASSIGN(JsonFields json, JsonFields::read(config.path, kMaxConfigBytes));
  const Family* family = read_architecture(json);
  TANDEM_TRY(json.status());
  config.architecture = family->architecture;
  read_common(json, config);
  TANDEM_TRY(json.status());
  family->read_config(json, config);
  add_eos(json, config.vocab_size, config.generation);
  TANDEM_TRY(json.status());
  config.canonical_json = json.canonical_text(kIgnoredKeys);
  const std::string folder = config.path.substr(0, config.path.rfind('/') + 1);
  TANDEM_TRY(read_quant_files(folder, config.quant));
  TANDEM_TRY(read_generation(folder + "generation_config.json", config.vocab_size, config.generation));
  return config;
}

}  // namespace tandem::model
