// The share of a model that one tensor rank computes, as a config: its heads, and its part of the dense widths.
#pragma once

#include "src/base/result.h"
#include "src/model/config.h"

namespace tandem::model {

// Faults name what cannot be shared evenly. Routed experts are not cut: they lie whole on one rank each.
Status split_config(ModelConfig& config, const TensorShard& shard);

}  // namespace tandem::model
