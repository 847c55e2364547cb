#include "src/model/rope.h"

#include <gtest/gtest.h>

#include <cmath>

namespace tandem::model {
namespace {

RopeConfig deepseek_v3_rope() {
  RopeConfig rope;
  rope.is_yarn = true;
  rope.factor = 40;
  rope.original_max_position = 4096;
  rope.mscale_all_dim = 1;
  return rope;
}

TEST(Rope, YarnRampMatchesKnownModels) {
  EXPECT_EQ(yarn_ramp(deepseek_v3_rope(), 64).low, 10);
  EXPECT_EQ(yarn_ramp(deepseek_v3_rope(), 64).high, 23);
  RopeConfig kimi;  // Kimi K2: theta 50000, beta_fast = beta_slow = 1
  kimi.is_yarn = true;
  kimi.theta = 50000;
  kimi.factor = 32;
  kimi.original_max_position = 4096;
  kimi.beta_fast = 1;
  EXPECT_EQ(yarn_ramp(kimi, 64).low, 19);
  EXPECT_EQ(yarn_ramp(kimi, 64).high, 20);
  RopeConfig oss;  // gpt-oss: untruncated
  oss.is_yarn = true;
  oss.theta = 150000;
  oss.factor = 32;
  oss.original_max_position = 4096;
  oss.truncate = false;
  EXPECT_NEAR(yarn_ramp(oss, 64).low, 8.0928, 1e-4);
  EXPECT_NEAR(yarn_ramp(oss, 64).high, 17.3980, 1e-4);
  EXPECT_NEAR(rope_attention_factor(oss), 1.3465736, 1e-7);
}

TEST(Rope, MscaleMatchesKnownModels) {
  EXPECT_NEAR(yarn_mscale(40, 1), 1.3688879, 1e-7);
  EXPECT_NEAR(yarn_mscale(40, 0.707), 1.2608038, 1e-7);
  EXPECT_EQ(yarn_mscale(1, 1), 1);
  EXPECT_NEAR(std::pow(yarn_mscale(40, 1), 2) / std::sqrt(192), 0.1352338, 1e-7);
  EXPECT_NEAR(std::pow(yarn_mscale(40, 0.707), 2) / std::sqrt(192), 0.1147214, 1e-7);
}

TEST(Rope, AttentionFactorFollowsTheConfig) {
  EXPECT_EQ(rope_attention_factor(RopeConfig{}), 1);
  EXPECT_EQ(rope_attention_factor(deepseek_v3_rope()), 1);
  RopeConfig plain = deepseek_v3_rope();
  plain.mscale_all_dim = 0;
  EXPECT_NEAR(rope_attention_factor(plain), 0.1 * std::log(40) + 1, 1e-12);
  plain.attention_factor = 1.25;
  EXPECT_EQ(rope_attention_factor(plain), 1.25);
}

TEST(Rope, YarnKeepsFastAndDividesSlowFrequencies) {
  const std::vector<float> plain = rope_frequencies(RopeConfig{}, 64);
  const std::vector<float> scaled = rope_frequencies(deepseek_v3_rope(), 64);
  EXPECT_EQ(plain[0], 1.0F);
  for (size_t i = 0; i <= 10; ++i) EXPECT_EQ(scaled[i], plain[i]);
  for (size_t i = 11; i < 23; ++i) EXPECT_LT(scaled[i], plain[i]);
  for (size_t i = 23; i < 32; ++i) EXPECT_NEAR(scaled[i] / plain[i], 1.0 / 40, 1e-8);
}

TEST(Rope, TableHoldsCosinesThenSines) {
  const std::vector<float> table = rope_table(RopeConfig{}, 8, 3);
  ASSERT_EQ(table.size(), 24U);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(table[i], 1.0F);
    EXPECT_EQ(table[4 + i], 0.0F);
    const double angle = 2 * std::pow(10000.0, -static_cast<double>(i) / 4);
    EXPECT_NEAR(table[16 + i], std::cos(angle), 1e-6);
    EXPECT_NEAR(table[20 + i], std::sin(angle), 1e-6);
  }
}

}  // namespace
}  // namespace tandem::model
