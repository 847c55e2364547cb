// The two places weights come from.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "src/model/checkpoint.h"
#include "src/model/config.h"
#include "src/model/weights.h"

namespace tandem::model {

// The checkpoint in `path`, whose layers must be those of the config.
Result<std::unique_ptr<Checkpoint>> open_matching_checkpoint(const std::string& path, const ModelConfig& config);

// Tensors of a checkpoint: bf16, f16, f32, F8_E4M3 with scales per block, or integers (stored_integers.h).
std::unique_ptr<WeightSource> make_checkpoint_source(std::unique_ptr<Checkpoint> checkpoint, const QuantConfig& quant);

// Random values that depend only on seed, tensor name and index: matrices about N(0, 0.02), norms about N(1, 0.02).
// A quantisation in the config is ignored: values are bf16.
std::unique_ptr<WeightSource> make_dummy_source(uint64_t seed);

}  // namespace tandem::model
