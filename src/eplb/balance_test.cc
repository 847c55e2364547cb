#include "src/eplb/balance.h"

#include <gtest/gtest.h>

#include "src/eplb/test_support.h"

namespace tandem::eplb {
namespace {

TEST(Balance, SharesAnExpertsTokensAmongItsCopies) {
  // Expert 0 on ranks 0 and 1, 1 on rank 0, 2 on rank 1.
  const std::vector<int32_t> slots{0, 1, 2, 0};
  const std::vector<int64_t> tokens{100, 30, 50};
  EXPECT_EQ(rank_loads(tokens, slots, 2), (std::vector<double>{80, 100}));
  EXPECT_EQ(balancedness(rank_loads(tokens, slots, 2)), 0.9);
}

TEST(Balance, IsOneWithoutTokens) {
  EXPECT_EQ(balancedness(std::vector<double>{0, 0}), 1);
  const ExpertLoad nothing(3, 4);
  const BalanceReport report = report_balance(nothing, Placement::initial(3, {4, 0, 2}));
  EXPECT_EQ(report.overall, 1);
  EXPECT_EQ(report.worst, 1);
}

TEST(Balance, ReportsLayersAndTheWhole) {
  const ExpertLoad load = load_of({{10, 10}, {30, 10}, {0, 100}});
  const BalanceReport report = report_balance(load, Placement::initial(3, {2, 0, 2}));
  ASSERT_EQ(report.layers.size(), 3U);
  EXPECT_EQ(report.layers[0], 1);
  EXPECT_EQ(report.layers[1], 20.0 / 30);
  EXPECT_EQ(report.layers[2], 0.5);
  EXPECT_EQ(report.p50, 20.0 / 30);
  EXPECT_EQ(report.p99, 0.5);
  EXPECT_EQ(report.worst, 0.5);
  EXPECT_EQ(report.overall, (10.0 + 20 + 50) / (10 + 30 + 100));
  EXPECT_EQ(report_expert_balance(load).layers, report.layers);  // an expert per rank
}

TEST(Balance, PercentilesOfManyLayers) {
  ExpertLoad load(200, 2);
  for (int64_t l = 0; l < 200; ++l) {
    load.layer(l)[0] = 1000;
    load.layer(l)[1] = 5 * l;  // balancedness (1000 + 5 l) / 2000, ascending
  }
  const BalanceReport report = report_expert_balance(load);
  EXPECT_EQ(report.worst, 0.5);
  EXPECT_EQ(report.p99, (1000 + 5 * 2) / 2000.0);  // two of 200 are below
  EXPECT_EQ(report.p50, (1000 + 5 * 100) / 2000.0);
}

}  // namespace
}  // namespace tandem::eplb
