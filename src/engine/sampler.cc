#include "src/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>
#include <unordered_set>

#include "src/engine/philox.h"

namespace tandem::engine {
namespace {

constexpr float kBarred = -std::numeric_limits<float>::infinity();

struct Candidate {
  double logit;
  TokenId token;
};

bool better(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

bool needs_edit(const SampleInput& input, const SamplingParams& params) {
  const int64_t output_length = static_cast<int64_t>(input.tokens.size()) - input.prompt_length;
  return !params.logit_bias.empty() || params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 ||
         params.presence_penalty != 0.0 || output_length < params.min_tokens;
}

// Applies biases, bars and penalties to a copy of the logits.
std::vector<float> edit_logits(const SampleInput& input, const SamplingParams& params) {
  std::vector<float> logits(input.logits.begin(), input.logits.end());
  const size_t vocabulary = logits.size();
  const auto in_range = [vocabulary](TokenId token) { return token >= 0 && static_cast<size_t>(token) < vocabulary; };

  for (const std::pair<TokenId, float>& bias : params.logit_bias) {
    if (in_range(bias.first)) logits[static_cast<size_t>(bias.first)] += bias.second;
  }
  const size_t prompt_length = static_cast<size_t>(input.prompt_length);
  if (static_cast<int64_t>(input.tokens.size() - prompt_length) < params.min_tokens) {
    for (TokenId token : input.eos_ids) {
      if (in_range(token)) logits[static_cast<size_t>(token)] = kBarred;
    }
    for (TokenId token : params.stop_token_ids) {
      if (in_range(token)) logits[static_cast<size_t>(token)] = kBarred;
    }
  }
  if (params.repetition_penalty != 1.0) {
    const std::unordered_set<TokenId> seen(input.tokens.begin(), input.tokens.end());
    for (TokenId token : seen) {
      if (!in_range(token)) continue;
      float& logit = logits[static_cast<size_t>(token)];
      logit = static_cast<float>(logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty);
    }
  }
  if (params.frequency_penalty != 0.0 || params.presence_penalty != 0.0) {
    std::unordered_map<TokenId, int64_t> counts;
    for (TokenId token : input.tokens.subspan(prompt_length)) ++counts[token];
    for (const std::pair<const TokenId, int64_t>& entry : counts) {
      if (!in_range(entry.first)) continue;
      float& logit = logits[static_cast<size_t>(entry.first)];
      logit = static_cast<float>(logit - params.frequency_penalty * static_cast<double>(entry.second) -
                                 params.presence_penalty);
    }
  }
  return logits;
}

// Highest finite logit, lowest id among equals; -1 if there is none.
TokenId argmax(std::span<const float> logits) {
  TokenId best = -1;
  float best_logit = kBarred;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > best_logit) {
      best_logit = logits[i];
      best = static_cast<TokenId>(i);
    }
  }
  return best;
}

// Brings the best candidates, in order, to the front until they hold `top_p` of the total weight; returns how many.
// Works on growing prefixes, since the nucleus is nearly always far smaller than the vocabulary.
size_t order_nucleus(std::vector<Candidate>& candidates, double max_logit, double total, double top_p) {
  size_t ordered = 0;
  double mass = 0;
  for (size_t wanted = 64;; wanted *= 8) {
    wanted = std::min(wanted, candidates.size());
    const std::ptrdiff_t from = static_cast<std::ptrdiff_t>(ordered);
    std::partial_sort(candidates.begin() + from, candidates.begin() + static_cast<std::ptrdiff_t>(wanted),
                      candidates.end(), better);
    for (; ordered < wanted; ++ordered) {
      mass += std::exp(candidates[ordered].logit - max_logit);
      if (mass >= top_p * total) return ordered + 1;
    }
    if (wanted == candidates.size()) return wanted;
  }
}

TokenId draw(std::span<const float> logits, TokenId best, uint64_t position, const SamplingParams& params) {
  const double inverse_temperature = 1.0 / params.temperature;
  const double max_logit = logits[static_cast<size_t>(best)] * inverse_temperature;
  // min-p keeps tokens with p >= min_p * p_max, that is logit >= max + ln(min_p).
  const double floor = params.min_p > 0 ? max_logit + std::log(params.min_p) : -std::numeric_limits<double>::infinity();

  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] == kBarred) continue;
    const double logit = logits[i] * inverse_temperature;
    if (logit >= floor) candidates.push_back({logit, static_cast<TokenId>(i)});
  }
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < candidates.size()) {
    std::nth_element(candidates.begin(), candidates.begin() + params.top_k, candidates.end(), better);
    candidates.resize(static_cast<size_t>(params.top_k));
    std::sort(candidates.begin(), candidates.end(), better);
  }
  double total = 0;
  for (const Candidate& candidate : candidates) total += std::exp(candidate.logit - max_logit);
  if (params.top_p < 1.0) {
    candidates.resize(order_nucleus(candidates, max_logit, total, params.top_p));
    total = 0;
    for (const Candidate& candidate : candidates) total += std::exp(candidate.logit - max_logit);
  }
  const double target = uniform_at(params.seed, position) * total;
  double sum = 0;
  for (const Candidate& candidate : candidates) {
    sum += std::exp(candidate.logit - max_logit);
    if (sum > target) return candidate.token;
  }
  return candidates.back().token;  // rounding left the sum a hair below the target
}

// Natural logarithms of the softmax of the untouched logits.
void fill_logprobs(std::span<const float> logits, int64_t count, GeneratedToken& chosen) {
  double max_logit = kBarred;
  for (float logit : logits) max_logit = std::max(max_logit, static_cast<double>(logit));
  double total = 0;
  for (float logit : logits) total += std::exp(logit - max_logit);
  const double log_total = max_logit + std::log(total);
  chosen.logprob = static_cast<float>(logits[static_cast<size_t>(chosen.token)] - log_total);
  if (count == 0) return;

  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) candidates.push_back({logits[i], static_cast<TokenId>(i)});
  const size_t wanted = std::min(static_cast<size_t>(count), candidates.size());
  std::partial_sort(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(wanted), candidates.end(),
                    better);
  for (size_t i = 0; i < wanted; ++i) {
    chosen.top_logprobs.emplace_back(candidates[i].token, static_cast<float>(candidates[i].logit - log_total));
  }
}

}  // namespace

Result<GeneratedToken> sample_token(const SampleInput& input, const SamplingParams& params) {
  CHECK(!input.logits.empty());
  for (float logit : input.logits) {
    if (std::isnan(logit) || logit == std::numeric_limits<float>::infinity()) {
      return make_error(ErrorKind::kDataLoss,
                        "the model produced a NaN or infinite logit at position {}; this request fails alone",
                        input.tokens.size());
    }
  }
  std::vector<float> edited;
  std::span<const float> logits = input.logits;
  if (needs_edit(input, params)) {
    edited = edit_logits(input, params);
    logits = edited;
  }
  GeneratedToken chosen;
  chosen.token = argmax(logits);
  if (chosen.token < 0) {
    return make_error(ErrorKind::kDataLoss, "no token may be chosen at position {}: every logit is -inf",
                      input.tokens.size());
  }
  // Below this a temperature cannot be told from greedy in double precision.
  constexpr double kSmallestTemperature = 1e-5;
  if (params.temperature >= kSmallestTemperature) {
    chosen.token = draw(logits, chosen.token, input.tokens.size(), params);
  }
  if (params.num_logprobs >= 0) fill_logprobs(input.logits, params.num_logprobs, chosen);
  return chosen;
}

}  // namespace tandem::engine
