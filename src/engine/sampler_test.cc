#include "src/engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

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

}  // namespace
}  // namespace tandem::engine
