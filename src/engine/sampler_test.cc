#include "src/engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "src/engine/philox.h"

namespace tandem::engine {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

SamplingParams greedy() {
  SamplingParams params;
  params.temperature = 0;
  return params;
}

TokenId choose(const std::vector<float>& logits, const SamplingParams& params, std::vector<TokenId> tokens = {0},
               int64_t prompt_length = 1, std::vector<TokenId> eos = {}) {
  return sample_token({logits, tokens, prompt_length, eos}, params).value().token;
}

TEST(Philox, MatchesThePublishedVectors) {
  // Known answers of the Random123 distribution for philox4x32-10.
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (std::array<uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Sampler, GreedyTakesTheLowestOfEqualLogits) { EXPECT_EQ(choose({1, 3, 3, 2}, greedy()), 1); }

TEST(Sampler, NonFiniteRowsFailAlone) {
  const std::vector<TokenId> tokens = {0};
  const std::vector<float> nan = {1, NAN, 2};
  const std::vector<float> barred = {-kInf, -kInf};
  EXPECT_EQ(sample_token({nan, tokens, 1, {}}, greedy()).error().kind, ErrorKind::kDataLoss);
  EXPECT_EQ(sample_token({barred, tokens, 1, {}}, greedy()).error().kind, ErrorKind::kDataLoss);
}

TEST(Sampler, BiasPenaltiesAndMinTokens) {
  SamplingParams params = greedy();
  params.logit_bias = {{2, 10.0F}, {99, 5.0F}};
  EXPECT_EQ(choose({3, 2, 1}, params), 2);

  params = greedy();
  params.min_tokens = 1;
  EXPECT_EQ(choose({3, 2, 1}, params, {7}, 1, {0}), 1);     // eos barred before min_tokens
  EXPECT_EQ(choose({3, 2, 1}, params, {7, 1}, 1, {0}), 0);  // allowed after

  params = greedy();
  params.repetition_penalty = 2;
  EXPECT_EQ(choose({3, 2, 1}, params, {0}, 1), 1);        // 3 / 2 < 2
  EXPECT_EQ(choose({-1, -1.5F, -9}, params, {0}, 1), 1);  // -1 * 2 < -1.5

  params = greedy();
  params.frequency_penalty = 0.6;
  EXPECT_EQ(choose({3, 2, 1}, params, {5, 0}, 1), 0);     // 3 - 0.6 > 2
  EXPECT_EQ(choose({3, 2, 1}, params, {5, 0, 0}, 1), 1);  // 3 - 1.2 < 2
  params = greedy();
  params.presence_penalty = 1.5;
  EXPECT_EQ(choose({3, 2, 1}, params, {0, 5}, 1), 0);  // the prompt does not count
  EXPECT_EQ(choose({3, 2, 1}, params, {5, 0}, 1), 1);
}

std::map<TokenId, double> frequencies(const std::vector<float>& logits, SamplingParams params, int draws) {
  std::map<TokenId, double> counts;
  for (int i = 0; i < draws; ++i) {
    params.seed = static_cast<uint64_t>(i);
    counts[choose(logits, params)] += 1.0 / draws;
  }
  return counts;
}

TEST(Sampler, FrequenciesFollowTheSoftmax) {
  const std::vector<float> logits = {std::log(0.5F), std::log(0.3F), std::log(0.2F)};
  SamplingParams params;
  const std::map<TokenId, double> counts = frequencies(logits, params, 20000);
  EXPECT_NEAR(counts.at(0), 0.5, 0.02);  // 5 standard deviations are 0.018
  EXPECT_NEAR(counts.at(1), 0.3, 0.02);
  EXPECT_NEAR(counts.at(2), 0.2, 0.02);
}

TEST(Sampler, TopKTopPAndMinPCutTheTail) {
  const std::vector<float> logits = {std::log(0.2F), std::log(0.5F), std::log(0.3F)};
  SamplingParams params;
  params.top_k = 1;
  EXPECT_EQ(frequencies(logits, params, 200).size(), 1U);
  params.top_k = 0;
  params.top_p = 0.75;
  std::map<TokenId, double> counts = frequencies(logits, params, 5000);
  EXPECT_EQ(counts.count(0), 0U);
  EXPECT_NEAR(counts.at(1), 0.5 / 0.8, 0.04);
  params.top_p = 1;
  params.min_p = 0.5;  // keeps p >= 0.25
  EXPECT_EQ(frequencies(logits, params, 500).count(0), 0U);
}

TEST(Sampler, NucleusLargerThanTheFirstSortedPieceIsWhole) {
  const std::vector<float> logits(1000, 0.0F);
  SamplingParams params;
  params.top_p = 0.5;
  TokenId largest = 0;
  for (uint64_t seed = 0; seed < 3000; ++seed) {
    params.seed = seed;
    largest = std::max(largest, choose(logits, params));
  }
  EXPECT_LT(largest, 500);  // equal logits: the lower half is the nucleus
  EXPECT_GT(largest, 450);
}

TEST(Sampler, SameSeedAndPositionSameToken) {
  std::vector<float> logits(500);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 7);
  SamplingParams params;
  params.seed = 42;
  EXPECT_EQ(choose(logits, params, {1, 2, 3}, 3), choose(logits, params, {9, 9, 9}, 1));
  bool differs = false;
  for (size_t length = 1; length < 20; ++length) {
    differs = differs || choose(logits, params, std::vector<TokenId>(length, 0), 1) != choose(logits, params, {0}, 1);
  }
  EXPECT_TRUE(differs);
}

TEST(Sampler, LogprobsAreOfTheUntouchedLogits) {
  const std::vector<float> logits = {std::log(0.5F), std::log(0.3F), std::log(0.2F)};
  SamplingParams params = greedy();
  params.num_logprobs = 2;
  params.logit_bias = {{2, 50.0F}};
  const std::vector<TokenId> tokens = {0};
  const GeneratedToken chosen = sample_token({logits, tokens, 1, {}}, params).value();
  EXPECT_EQ(chosen.token, 2);
  EXPECT_NEAR(chosen.logprob, std::log(0.2), 1e-6);
  ASSERT_EQ(chosen.top_logprobs.size(), 2U);
  EXPECT_EQ(chosen.top_logprobs[0].first, 0);
  EXPECT_NEAR(chosen.top_logprobs[1].second, std::log(0.3), 1e-6);
}

// The definition in sampler.h word for word: sort everything, sum everything.
TokenId choose_plainly(const std::vector<float>& logits, const SamplingParams& params, uint64_t position) {
  std::vector<std::pair<double, TokenId>> candidates;
  const double inverse_temperature = 1.0 / params.temperature;
  const double max_logit = *std::max_element(logits.begin(), logits.end()) * inverse_temperature;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double logit = logits[i] * inverse_temperature;
    if (logits[i] == -kInf || (params.min_p > 0 && logit < max_logit + std::log(params.min_p))) continue;
    candidates.emplace_back(logit, static_cast<TokenId>(i));
  }
  const auto best_first = [](const auto& a, const auto& b) { return a.first > b.first; };
  const auto total = [&] {
    double sum = 0;
    for (const auto& candidate : candidates) sum += std::exp(candidate.first - max_logit);
    return sum;
  };
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < candidates.size()) {
    std::stable_sort(candidates.begin(), candidates.end(), best_first);
    candidates.resize(static_cast<size_t>(params.top_k));
  }
  if (params.top_p < 1) {
    const double wanted = params.top_p * total();
    std::stable_sort(candidates.begin(), candidates.end(), best_first);
    double mass = 0;
    size_t size = 0;
    while (size < candidates.size() && mass < wanted) mass += std::exp(candidates[size++].first - max_logit);
    candidates.resize(size);
  }
  const double target = uniform_at(params.seed, position) * total();
  double sum = 0;
  for (const auto& candidate : candidates) {
    sum += std::exp(candidate.first - max_logit);
    if (sum > target) return candidate.second;
  }
  return candidates.back().second;
}

// Every shortcut gives what sorting the vocabulary gives: the same bits decide, so the same token comes out.
TEST(Sampler, ShortcutsAgreeWithSortingEverything) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const auto one_of = [&random](auto... values) {
    const std::array list{static_cast<double>(values)...};
    return list[random() % list.size()];
  };
  std::set<TokenId> chosen_tokens;
  for (int round = 0; round < 3000; ++round) {
    std::vector<float> logits(static_cast<size_t>(one_of(1, 2, 40, 500, 3000)));
    std::normal_distribution<float> normal(0, static_cast<float>(one_of(0.01, 1, 5)));
    const bool has_ties = random() % 2 == 0;
    for (float& logit : logits) {
      logit = normal(random);
      if (has_ties) logit = std::round(logit * 4) / 4;
      if (random() % 50 == 0) logit = -kInf;
    }
    logits[random() % logits.size()] = 1;  // one at least may be chosen
    SamplingParams params;
    params.temperature = one_of(0.1, 0.7, 1, 2);
    params.top_k = static_cast<int64_t>(one_of(0, 0, 1, 5, 50, 499, 5000));
    params.top_p = one_of(1, 1, 0.999999999, 0.99, 0.9, 0.5, 0.01);
    params.min_p = one_of(0, 0, 0.01, 0.3);
    params.seed = random();
    params.num_logprobs = static_cast<int64_t>(one_of(-1, 3, 20));
    const std::vector<TokenId> tokens(1 + random() % 20, 0);
    const GeneratedToken chosen = sample_token({logits, tokens, 1, {}}, params).value();
    ASSERT_EQ(chosen.token, choose_plainly(logits, params, tokens.size())) << "round " << round;
    chosen_tokens.insert(chosen.token);
    if (params.num_logprobs < 0) continue;
    std::vector<TokenId> sorted(logits.size());
    std::iota(sorted.begin(), sorted.end(), 0);
    std::stable_sort(sorted.begin(), sorted.end(), [&](TokenId a, TokenId b) {
      return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
    });
    ASSERT_EQ(chosen.top_logprobs.size(), std::min(logits.size(), static_cast<size_t>(params.num_logprobs)));
    for (size_t i = 0; i < chosen.top_logprobs.size(); ++i) ASSERT_EQ(chosen.top_logprobs[i].first, sorted[i]);
  }
  EXPECT_GT(chosen_tokens.size(), 100U);
}

}  // namespace
}  // namespace tandem::engine
