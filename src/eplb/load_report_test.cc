#include "src/eplb/load_report.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <numeric>

namespace tandem::eplb {
namespace {

using nlohmann::json;

// Two layers of four experts and two redundant slots on two ranks: [0 1 2] [3 0 1].
LoadReport make_report() {
  LoadReport report;
  report.steps = 7;
  report.num_nodes = 2;
  report.changes = 3;
  report.load = ExpertLoad(2, 4);
  const std::vector<int64_t> first = {10, 6, 5, 1};
  std::copy(first.begin(), first.end(), report.load.layer(0).begin());
  report.placement = Placement::initial(2, {.num_experts = 4, .num_redundant = 2, .num_ranks = 2});
  report.balance = report_balance(report.load, report.placement);
  return report;
}

TEST(LoadReport, ShowsEveryRanksExperts) {
  const LoadReport report = make_report();
  const std::vector<int64_t> layers = {1, 5};
  const json shown = json::parse(format_load_report(report, layers));
  EXPECT_EQ(shown["layers"], json({1, 5}));
  EXPECT_EQ(shown["steps"], 7);
  EXPECT_EQ(shown["num_ranks"], 2);
  EXPECT_EQ(shown["num_nodes"], 2);
  EXPECT_EQ(shown["hierarchical"], false);
  EXPECT_EQ(shown["changes"], 3);
  EXPECT_EQ(shown["planned"], nullptr);
  EXPECT_EQ(shown["experts"][0], json({{0, 1, 2}, {3, 0, 1}}));
  EXPECT_EQ(shown["tokens"][0], json({{5.0, 3.0, 5.0}, {1.0, 5.0, 3.0}}));
  EXPECT_EQ(shown["rank_tokens"], json({{13.0, 9.0}, {0.0, 0.0}}));
  EXPECT_EQ(shown["balance"]["layers"], json({0.8462, 1.0}));  // 11 / 13, and nothing was asked of the other layer
  EXPECT_EQ(shown["balance"]["overall"], 0.8462);
  EXPECT_EQ(shown["balance"]["worst"], 0.8462);
  EXPECT_EQ(total_rank_loads(report), (std::vector<double>{13, 9}));
}

TEST(LoadReport, ShowsWhatIsPlanned) {
  LoadReport report = make_report();
  report.planned = BalanceReport{.layers = {0.5, 0.75}, .overall = 0.625, .p50 = 0.75, .p99 = 0.5, .worst = 0.5};
  const std::vector<int64_t> layers = {0, 1};
  const json shown = json::parse(format_load_report(report, layers));
  EXPECT_EQ(shown["planned"],
            json::parse(R"({"overall":0.625,"p50":0.75,"p99":0.5,"worst":0.5,"layers":[0.5,0.75]})"));
}

}  // namespace
}  // namespace tandem::eplb
