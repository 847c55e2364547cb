#include "src/model/tensor_split.h"

#include <algorithm>

namespace tandem::model {
namespace {

Status cut(const ModelConfig& config, const char* field, const TensorShard& shard, int64_t& value) {
  if (value % shard.size != 0) {
    return invalid_argument("tensor-parallel-size",
                            "--tensor-parallel-size {}: {} of \"{}\" is {}, which {} ranks cannot share evenly; take a "
                            "divisor of it",
                            shard.size, field, printable(config.path), value, shard.size);
  }
  value /= shard.size;
  return {};
}

}  // namespace

Status split_config(ModelConfig& config, const TensorShard& shard) {
  config.tensor = shard;
  TANDEM_TRY(cut(config, "num_attention_heads", shard, config.num_heads));
  if (config.gqa.kv_heads > 0) TANDEM_TRY(cut(config, "num_key_value_heads", shard, config.gqa.kv_heads));
  const std::vector<bool>& is_moe = config.layer_is_moe;
  if (std::find(is_moe.begin(), is_moe.end(), false) != is_moe.end()) {
    TANDEM_TRY(cut(config, "intermediate_size", shard, config.dense_width));
  }
  return cut(config, "the shared experts' width", shard, config.moe.shared_width);
}

}  // namespace tandem::model
