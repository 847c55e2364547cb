// Chooses the next token from one row of logits. Pure: the choice depends on the logits, the parameters, the tokens so
// far and the position alone, never on other requests.
#pragma once

#include <span>

#include "src/base/result.h"
#include "src/engine/worker.h"

namespace tandem::engine {

struct SampleInput {
  std::span<const float> logits;    // [vocabulary that may be chosen]
  std::span<const TokenId> tokens;  // prompt and output so far; the chosen token gets position tokens.size()
  int64_t prompt_length = 0;
  std::span<const TokenId> eos_ids;  // kept back until min_tokens
};

// Order of operations: logprobs of the untouched logits; logit_bias; eos and stop ids barred before min_tokens;
// repetition (Keskar et al., CTRL, arXiv:1909.05858), frequency and presence penalties; then greedy, or temperature,
// top-k, min-p, top-p, and inversion of the cumulative distribution at uniform_at(seed, position).
// Equal logits: the lower token id first. A row with NaN, or without any finite logit, is kDataLoss.
Result<GeneratedToken> sample_token(const SampleInput& input, const SamplingParams& params);

}  // namespace tandem::engine
