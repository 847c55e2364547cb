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

bool is_earlier(const Candidate& a, const Candidate& b) { return a.token < b.token; }

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

// Highest finite logit, lowest id among equals; -1 if there is none. Sets `is_bad` if a logit is NaN or +infinity.
TokenId argmax(std::span<const float> logits, bool& is_bad) {
  TokenId best = -1;
  float best_logit = kBarred;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] <= best_logit) continue;  // a NaN is not
    if (!(logits[i] < std::numeric_limits<float>::infinity())) {
      is_bad = true;
      return -1;
    }
    best_logit = logits[i];
    best = static_cast<TokenId>(i);
  }
  return best;
}

// The `count` best of the logits that are not barred, in no order. One pass: whatever does not beat the worst of the
// best so far is passed over; the others gather behind them until they are as many again.
std::vector<Candidate> select_best(std::span<const float> logits, size_t count) {
  constexpr size_t kLeastBuffer = 256;
  const size_t buffer = std::max(2 * count, kLeastBuffer);
  std::vector<Candidate> best;
  best.reserve(std::min(buffer, logits.size()));
  const auto keep_best = [&best, count] {
    std::nth_element(best.begin(), best.begin() + static_cast<std::ptrdiff_t>(count) - 1, best.end(), better);
    best.resize(count);
  };
  float worst = kBarred;  // ties go to the lower token, which comes first: later ones must be higher
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!(logits[i] > worst)) continue;
    best.push_back({logits[i], static_cast<TokenId>(i)});
    if (best.size() < buffer) continue;
    keep_best();
    worst = static_cast<float>(best.back().logit);
  }
  if (best.size() > count) keep_best();
  return best;
}

// What top-k and min-p leave, with logits divided by the temperature. In order of tokens, or, if top-k left some out,
// best first. The order is part of the definition, since sums depend on it.
std::vector<Candidate> list_candidates(std::span<const float> logits, double max_logit, const SamplingParams& params) {
  const double inverse_temperature = 1.0 / params.temperature;
  // min-p keeps tokens with p >= min_p * p_max, that is logit >= max + ln(min_p).
  const double floor = params.min_p > 0 ? max_logit + std::log(params.min_p) : -std::numeric_limits<double>::infinity();
  std::vector<Candidate> candidates;
  if (params.top_k == 0 || static_cast<size_t>(params.top_k) >= logits.size()) {
    for (size_t i = 0; i < logits.size(); ++i) {
      const double logit = logits[i] * inverse_temperature;
      if (logit >= floor && logits[i] != kBarred) candidates.push_back({logit, static_cast<TokenId>(i)});
    }
    return candidates;
  }
  // One more than top_k tells whether any is left out. Dividing by the temperature does not change their order.
  const size_t top_k = static_cast<size_t>(params.top_k);
  candidates = select_best(logits, top_k + 1);
  for (Candidate& candidate : candidates) candidate.logit *= inverse_temperature;
  std::erase_if(candidates, [floor](const Candidate& candidate) { return candidate.logit < floor; });
  if (candidates.size() > top_k) {
    std::sort(candidates.begin(), candidates.end(), better);
    candidates.pop_back();
  } else {
    std::sort(candidates.begin(), candidates.end(), is_earlier);
  }
  return candidates;
}

std::vector<double> weights_of(std::span<const Candidate> candidates, double max_logit) {
  std::vector<double> weights;
  weights.reserve(candidates.size());
  for (const Candidate& candidate : candidates) weights.push_back(std::exp(candidate.logit - max_logit));
  return weights;
}

double sum_of(std::span<const double> weights) {
  double sum = 0;
  for (double weight : weights) sum += weight;
  return sum;
}

// Below this weight a token cannot be in the nucleus: half of an even share of what the nucleus may leave out. All such
// tokens together are at most half of it, far more than sums are off by.
double least_nucleus_weight(size_t count, double total, double top_p) {
  constexpr double kLeastRest = 1e-6;
  return 1 - top_p < kLeastRest ? 0 : 0.5 * (1 - top_p) * total / static_cast<double>(count);
}

// Brings the best candidates, in order, to the front until they hold `top_p` of the total weight; returns how many.
// Works on growing prefixes, since the nucleus is nearly always far smaller than the vocabulary.
size_t order_nucleus(std::vector<Candidate>& candidates, double max_logit, double total, double top_p) {
  size_t ordered = 0;
  double mass = 0;
  for (size_t wanted = 64;; wanted *= 8) {
    wanted = std::min(wanted, candidates.size());
    const auto from = candidates.begin() + static_cast<std::ptrdiff_t>(ordered);
    const auto to = candidates.begin() + static_cast<std::ptrdiff_t>(wanted);
    if (to != candidates.end()) std::nth_element(from, to, candidates.end(), better);
    std::sort(from, to, better);
    for (; ordered < wanted; ++ordered) {
      mass += std::exp(candidates[ordered].logit - max_logit);
      if (mass >= top_p * total) return ordered + 1;
    }
    if (wanted == candidates.size()) return wanted;
  }
}

// The index at which the running sum of weights passes `share` of their total; the last that has any weight if rounding
// leaves the sum a hair below it.
size_t invert_cumulative(std::span<const double> weights, double total, double share) {
  const double target = share * total;
  double sum = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    sum += weights[i];
    if (sum > target) return i;
  }
  size_t last = weights.size() - 1;
  while (last > 0 && weights[last] == 0) --last;
  return last;
}

// From candidates whose weights, with those left out, sum to `total`.
TokenId draw_from(std::vector<Candidate>& candidates, double max_logit, double total, double share, double top_p) {
  if (top_p < 1) candidates.resize(order_nucleus(candidates, max_logit, total, top_p));
  const std::vector<double> weights = weights_of(candidates, max_logit);
  return candidates[invert_cumulative(weights, sum_of(weights), share)].token;
}

// Any token may be chosen that is not barred; a barred one weighs exactly nothing.
TokenId draw_from_all(std::span<const float> logits, double max_logit, double share, const SamplingParams& params) {
  const double inverse_temperature = 1.0 / params.temperature;
  std::vector<double> weights;
  weights.reserve(logits.size());
  for (float logit : logits) weights.push_back(std::exp(logit * inverse_temperature - max_logit));
  const double total = sum_of(weights);
  if (params.top_p >= 1) return static_cast<TokenId>(invert_cumulative(weights, total, share));
  const double least = least_nucleus_weight(weights.size(), total, params.top_p);
  std::vector<Candidate> candidates;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] < least || logits[i] == kBarred) continue;
    candidates.push_back({logits[i] * inverse_temperature, static_cast<TokenId>(i)});
  }
  return draw_from(candidates, max_logit, total, share, params.top_p);
}

TokenId draw(std::span<const float> logits, TokenId best, uint64_t position, const SamplingParams& params) {
  const double max_logit = logits[static_cast<size_t>(best)] * (1.0 / params.temperature);
  const double share = uniform_at(params.seed, position);
  const bool has_top_k = params.top_k > 0 && static_cast<size_t>(params.top_k) < logits.size();
  if (!has_top_k && params.min_p <= 0) return draw_from_all(logits, max_logit, share, params);
  std::vector<Candidate> candidates = list_candidates(logits, max_logit, params);
  const double total = sum_of(weights_of(candidates, max_logit));
  return draw_from(candidates, max_logit, total, share, params.top_p);
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

  const size_t wanted = std::min(static_cast<size_t>(count), logits.size());
  std::vector<Candidate> best = select_best(logits, wanted);
  std::sort(best.begin(), best.end(), better);
  for (size_t i = 0; best.size() < wanted; ++i) {
    if (logits[i] == kBarred) best.push_back({kBarred, static_cast<TokenId>(i)});
  }
  for (const Candidate& candidate : best) {
    chosen.top_logprobs.emplace_back(candidate.token, static_cast<float>(candidate.logit - log_total));
  }
}

}  // namespace

Result<GeneratedToken> sample_token(const SampleInput& input, const SamplingParams& params) {
  CHECK(!input.logits.empty());
  GeneratedToken chosen;
  bool is_bad = false;
  chosen.token = argmax(input.logits, is_bad);
  std::vector<float> edited;
  std::span<const float> logits = input.logits;
  if (!is_bad && needs_edit(input, params)) {
    edited = edit_logits(input, params);
    logits = edited;
    chosen.token = argmax(logits, is_bad);
  }
  if (is_bad) {
    return make_error(ErrorKind::kDataLoss,
                      "the model produced a NaN or infinite logit at position {}; this request fails alone",
                      input.tokens.size());
  }
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
