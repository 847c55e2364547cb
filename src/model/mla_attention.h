// Multi-head latent attention (MLA, arXiv:2405.04434 §2.1), for every family that has it.
#pragma once

#include <memory>

#include "src/model/family.h"

namespace tandem::model {

std::unique_ptr<Attention> make_mla_attention(kernels::Ops& ops, kernels::Stream& stream, const ModelConfig& config);

}  // namespace tandem::model
