// What a model folder's config.json and generation_config.json say, checked field by field, in one shape for all
// families. Nothing here is trusted further down without having been range-checked in config.cc or in the family's
// file.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "src/base/ids.h"
#include "src/base/result.h"
#include "src/kernels/ops.h"
#include "src/model/json_fields.h"
#include "src/model/quant_config.h"
#include "src/model/tensor_exchange.h"

namespace tandem::model {

// Limits of any size in a config. They keep every product of two or three of them far below 2^63.
constexpr int64_t kMaxDim = int64_t{1} << 20;
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxExperts = 4096;
constexpr int64_t kMaxPositions = int64_t{1} << 26;

struct RopeConfig {
  double theta = 10000;
  bool is_yarn = false;
  // Below: YaRN only.
  double factor = 1;
  int64_t original_max_position = 0;
  double beta_fast = 32;
  double beta_slow = 1;
  bool truncate = true;
  double mscale = 1;
  double mscale_all_dim = 0;
  std::optional<double> attention_factor;  // replaces the mscale rule
};

// Grouped-query attention.
struct GqaConfig {
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
};

// Multi-head latent attention.
struct MlaConfig {
  int64_t q_lora_rank = 0;  // 0: q is one projection
  int64_t kv_lora_rank = 0;
  int64_t nope_dim = 0;
  int64_t rope_dim = 0;
  int64_t value_dim = 0;
  bool rope_interleaved = true;
};

struct MoeConfig {
  int64_t num_experts = 0;
  int64_t expert_width = 0;
  int64_t shared_width = 0;  // of all shared experts together; 0: none
  bool has_correction_bias = false;
  kernels::RouterParams router;
};

// Defaults of the sampling parameters; a request's own values win.
struct GenerationConfig {
  std::vector<TokenId> eos_token_ids;  // of config.json and generation_config.json, ascending
  std::optional<double> temperature;
  std::optional<double> top_p;
  std::optional<int64_t> top_k;  // 0: off
};

struct ModelConfig {
  std::string path;  // of config.json
  std::string architecture;
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_layers = 0;  // without MTP layers
  int64_t num_heads = 0;
  int64_t dense_width = 0;
  int64_t max_positions = 0;
  float rms_norm_eps = 1e-6F;
  bool tied_embeddings = false;
  RopeConfig rope;
  GqaConfig gqa;  // one of the two has heads
  MlaConfig mla;
  MoeConfig moe;
  std::vector<bool> layer_is_moe;  // [num_layers]
  QuantConfig quant;
  GenerationConfig generation;
  // Of tensor parallelism (tensor_split.h): heads and widths above are this rank's share.
  TensorShard tensor;
  std::string canonical_json;  // sorted keys, without those that cannot change a result; for the fingerprint
};

// Reads <directory>/config.json (or `path` itself if it is a file) and generation_config.json beside it if there.
Result<ModelConfig> load_config(const std::string& path);

// The fields that several families share, read the same way.
RopeConfig read_rope(JsonFields& json);

}  // namespace tandem::model
