// The policies on cases with known answers.
#include "src/eplb/policy.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <ctime>

#include "src/eplb/balance.h"
#include "src/eplb/config.h"
#include "src/eplb/moves.h"
#include "src/eplb/replicate.h"
#include "src/eplb/test_support.h"

namespace tandem::eplb {
namespace {

using Slots = std::vector<int32_t>;

Slots layer_of(const Placement& placement, int64_t layer) {
  return {placement.layer(layer).begin(), placement.layer(layer).end()};
}

// The example of DeepSeek's README.
const std::vector<std::vector<int64_t>> kReadme = {{90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86},
                                                   {20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27}};
const Layout kReadmeLayout{12, 4, 8, 2, 4};

double rounded(double value) { return std::round(value * 1000) / 1000; }

TEST(DefaultPolicy, GivesTheSlotsOfItsPublishedExample) {
  const LoadSeries window{load_of(kReadme)};
  const Placement next = rebalance(Policy::kDefault, {window, kReadmeLayout, Placement::initial(2, kReadmeLayout)});
  EXPECT_EQ(layer_of(next, 0), (Slots{5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1}));
  EXPECT_EQ(layer_of(next, 1), (Slots{7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1}));
  const BalanceReport report = report_balance(window.front(), next);
  EXPECT_EQ(rounded(report.layers[0]), 0.828);
  EXPECT_EQ(rounded(report.layers[1]), 0.805);
}

TEST(DefaultPolicy, IsGlobalWhereGroupsDoNotDivide) {
  const LoadSeries window{load_of(kReadme)};
  Layout layout = kReadmeLayout;
  layout.num_groups = 3;  // not by 2 nodes
  EXPECT_FALSE(layout.is_hierarchical());
  const Placement next = rebalance(Policy::kDefault, {window, layout, Placement::initial(2, layout)});
  const BalanceReport report = report_balance(window.front(), next);
  EXPECT_EQ(rounded(report.layers[0]), 0.932);
  EXPECT_EQ(rounded(report.layers[1]), 0.840);
  layout.num_nodes = layout.num_groups = 1;
  EXPECT_EQ(rebalance(Policy::kDefault, {window, layout, Placement::initial(2, layout)}), next);
}

TEST(DefaultPolicy, KeepsGroupsInTheirNode) {
  const LoadSeries window{load_of(kReadme)};
  const Placement next = rebalance(Policy::kDefault, {window, kReadmeLayout, Placement::initial(2, kReadmeLayout)});
  for (int64_t l = 0; l < 2; ++l) {
    std::vector<int64_t> node_of_group(4, -1);
    for (size_t s = 0; s < 16; ++s) {
      int64_t& node = node_of_group[static_cast<size_t>(next.layer(l)[s] / 3)];
      if (node < 0) node = static_cast<int64_t>(s / 8);
      EXPECT_EQ(node, static_cast<int64_t>(s / 8));
    }
  }
}

double peak_of(const ExpertLoad& load, const Placement& placement) {
  const std::vector<double> loads = rank_loads(load.layer(0), placement.layer(0), placement.num_ranks());
  return *std::max_element(loads.begin(), loads.end());
}

// Where greedy copies are wrong: the case by which FlashLB was proposed (232 against its 205).
TEST(FlashPolicy, BeatsGreedyCopies) {
  const LoadSeries window{load_of({{600, 560, 120, 120, 20, 10, 10, 10}})};
  const Layout layout{8, 8, 8};
  const Placement initial = Placement::initial(1, layout);
  EXPECT_EQ(peak_of(window[0], rebalance(Policy::kDefault, {window, layout, initial})), 232);
  const double flash = peak_of(window[0], rebalance(Policy::kFlash, {window, layout, initial}));
  std::printf("fullest rank: default 232, flash %.1f\n", flash);
  EXPECT_LE(flash, 205);
}

// Two experts that are busy in turn, and two that are steady, all alike on average: only their samples tell which may
// share a rank.
TEST(FlashPolicy, PairsExpertsThatAreBusyInTurn) {
  LoadSeries window;
  for (int t = 0; t < 16; ++t) {
    const int64_t high = 2000;
    const int64_t low = 0;
    const bool even = t % 2 == 0;
    // 0 and 1 rise together, 2 and 3 fall then.
    window.push_back(load_of({{even ? high : low, even ? high : low, even ? low : high, even ? low : high}}));
  }
  const Layout layout{4, 0, 2};
  const Placement initial = Placement::initial(1, layout);  // 0 and 1 on rank 0
  const Placement next = rebalance(Policy::kFlash, {window, layout, initial});
  for (const size_t rank : {size_t{0}, size_t{1}}) {
    const bool low_pair = next.layer(0)[2 * rank] < 2;
    EXPECT_NE(low_pair, next.layer(0)[2 * rank + 1] < 2);
  }
  // By the sum alone nothing is to be done.
  EXPECT_EQ(rebalance(Policy::kSwift, {window, layout, initial}), initial);
}

// 32 ranks of two experts, the first fuller than the others, the last four emptier: 0.86 balanced.
TEST(FlashPolicy, LeavesALayerUntilItIsWorseThanAfterItsLastRebalance) {
  const Layout layout{64, 0, 32};
  const Placement initial = Placement::initial(1, layout);
  std::vector<int64_t> tokens(64);
  for (size_t e = 0; e < tokens.size(); ++e) tokens[e] = e % 2 == 0 ? 60 : 40;
  tokens[1] = 54;
  for (size_t e = 56; e < 64; ++e) tokens[e] -= 10;
  const LoadSeries window{load_of({tokens})};
  EXPECT_EQ(rounded(report_balance(window[0], initial).overall), 0.859);
  EXPECT_EQ(rebalance(Policy::kFlash, {window, layout, initial}), initial);
  const std::vector<double> past{0.95};
  EXPECT_EQ(rebalance(Policy::kFlash, {window, layout, initial, past}), initial);
  const std::vector<double> better_past{1.0};
  const Placement next = rebalance(Policy::kFlash, {window, layout, initial, better_past});
  EXPECT_GT(report_balance(window[0], next).overall, 0.9);
}

struct Figures {
  double worst = 1;
  double overall = 0;
  int64_t moves = 0;
  double ms_per_layer = 0;
};

Figures measure(Policy policy, const LoadSeries& window, const Layout& layout) {
  const Placement initial = Placement::initial(window[0].num_layers(), layout);
  const std::clock_t begin = std::clock();  // of the processor: other programs do not count
  Placement next = rebalance(policy, {window, layout, initial});
  const double took_ms = 1e3 * static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
  EXPECT_EQ(policy != Policy::kDefault && has_duplicates(next), false) << policy_name(policy);
  keep_slots(initial, next);
  const BalanceReport report = report_balance(sum_of(window), next);
  return {report.worst, report.overall, plan_moves(initial, next, 1).num_remote(),
          took_ms / static_cast<double>(next.num_layers())};
}

// One spare slot per rank evens the skew that was measured on real text (zipf 0.6), with a third of the moves.
TEST(Policies, EvenOutAMeasuredSkew) {
  RandomBits random(20);
  const LoadSeries window{zipf_load(random, 8, 256, 0.6)};
  const Layout layout{256, 32, 32};
  const double before = report_balance(window[0], Placement::initial(8, layout)).overall;
  std::printf("256 experts, 32 ranks of 9 slots, zipf 0.6: overall balance %.3f before\n", before);
  EXPECT_LT(before, 0.6);
  const Figures by_default = measure(Policy::kDefault, window, layout);
  for (const Policy policy : {Policy::kDefault, Policy::kSwift, Policy::kFlash}) {
    const Figures figures = measure(policy, window, layout);
    std::printf("  %-8s worst layer %.4f, %4.0f moves a layer of 288 slots, %.2f ms a layer\n", policy_name(policy),
                figures.worst, static_cast<double>(figures.moves) / 8, figures.ms_per_layer);
    EXPECT_GE(figures.worst, 0.99) << policy_name(policy);
    EXPECT_LE(figures.moves, by_default.moves) << policy_name(policy);
  }
}

// A window of 16 samples, so that `flash` has all its work. The bound is loose, for sanitizers.
TEST(Policies, PlanALargeModelInTime) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr int64_t kLayers = 2;
#else
  constexpr int64_t kLayers = 58;
#endif
  RandomBits random(21);
  for (const Layout& layout : {Layout{256, 32, 32}, Layout{256, 32, 144}}) {
    LoadSeries window{zipf_load(random, kLayers, 256, 0.6)};
    while (window.size() < 16) window.push_back(drifted(random, window.front(), 0.2));
    for (const Policy policy : {Policy::kDefault, Policy::kSwift, Policy::kFlash}) {
      const Figures figures = measure(policy, window, layout);
      std::printf(
          "%ld layers x 256 experts + 32, %ld ranks, %-8s %.2f ms a layer, %.0f ms in all; worst %.3f, overall "
          "%.3f, %.0f moves a layer\n",
          static_cast<long>(kLayers), static_cast<long>(layout.num_ranks), policy_name(policy), figures.ms_per_layer,
          figures.ms_per_layer * kLayers, figures.worst, figures.overall, static_cast<double>(figures.moves) / kLayers);
      EXPECT_LT(figures.ms_per_layer, 1000);
    }
  }
}

TEST(Replicate, ShiftsFromGivenCopiesToTheSameLargestShare) {
  const std::vector<double> weights{600, 560, 120, 120, 20, 10, 10, 10};
  const std::vector<int32_t> greedy = replicate(weights, 16, 8);
  EXPECT_EQ(greedy, (std::vector<int32_t>{5, 5, 1, 1, 1, 1, 1, 1}));
  EXPECT_EQ(shift_copies(weights, {2, 2, 2, 2, 2, 2, 2, 2}, 8, 0), greedy);
  EXPECT_EQ(shift_copies(weights, greedy, 8, 0), greedy);
  EXPECT_EQ(shift_copies(weights, {2, 2, 2, 2, 2, 2, 2, 2}, 8, 300), (std::vector<int32_t>{2, 2, 2, 2, 2, 2, 2, 2}));
}

TEST(EplbConfig, TakesTheFieldsOfVllm) {
  const EplbConfig config = parse_eplb_config(R"({"window_size":100,"step_interval":300,"num_redundant_experts":2,)"
                                              R"("log_balancedness":true,"use_async":false,"policy":"flash"})")
                                .value();
  EXPECT_EQ(config.window_size, 100);
  EXPECT_EQ(config.step_interval, 300);
  EXPECT_EQ(config.num_redundant_experts, 2);
  EXPECT_TRUE(config.log_balancedness);
  EXPECT_FALSE(config.use_async);
  EXPECT_EQ(config.policy, Policy::kFlash);
  EXPECT_EQ(parse_eplb_config("{}")->window_size, 1000);
}

TEST(EplbConfig, RefusesWhatItDoesNotUnderstand) {
  const auto error_of = [](const char* text) {
    const Result<EplbConfig> config = parse_eplb_config(text);
    return config.ok() ? std::string("no error") : config.error().message;
  };
  EXPECT_EQ(error_of(R"({"window_sise":1})"),
            "--eplb-config: unknown field 'window_sise'; did you mean 'window_size'?");
  EXPECT_EQ(error_of(R"({"communicator":"nixl"})"),
            "--eplb-config: unknown field 'communicator'; the fields are window_size, step_interval, "
            "num_redundant_experts, log_balancedness, use_async, policy");
  EXPECT_EQ(error_of(R"({"window_size":0})"),
            "--eplb-config: window_size is 0; it must be an integer from 1 to 1000000000");
  EXPECT_EQ(error_of(R"({"window_size":18446744073709551615})"),
            "--eplb-config: window_size is 18446744073709551615; it must be an integer from 1 to 1000000000");
  EXPECT_EQ(error_of(R"({"step_interval":1.5})"),
            "--eplb-config: step_interval is 1.5; it must be an integer from 1 to 1000000000");
  EXPECT_EQ(error_of(R"({"use_async":1})"), "--eplb-config: use_async is 1; it must be true or false");
  EXPECT_EQ(error_of(R"({"policy":"quick"})"),
            "--eplb-config: policy is \"quick\"; it must be \"default\", \"swift\" or \"flash\"");
  EXPECT_EQ(error_of("[1]"), "--eplb-config: '[1]' is not a JSON object such as '{\"window_size\":1000}'");
}

}  // namespace
}  // namespace tandem::eplb
