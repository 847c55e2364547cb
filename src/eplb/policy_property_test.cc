// What every policy promises, on random loads, and how near to the best possible it comes on small ones.
#include <gtest/gtest.h>

#include <cstdio>
#include <functional>
#include <map>

#include "src/eplb/balance.h"
#include "src/eplb/moves.h"
#include "src/eplb/policy.h"
#include "src/eplb/test_support.h"

namespace tandem::eplb {
namespace {

constexpr Policy kPolicies[] = {Policy::kDefault, Policy::kSwift, Policy::kFlash};

// A layout that check_layout accepts; often with nodes and groups.
Layout random_layout(RandomBits& random) {
  while (true) {
    Layout layout;
    layout.num_nodes = 1 + below(random, 3);
    layout.num_ranks = layout.num_nodes * (1 + below(random, 4));
    layout.num_groups = layout.num_nodes * (1 + below(random, 3));
    layout.num_experts = layout.num_groups * (1 + below(random, 8));
    layout.num_redundant = below(random, 2 * layout.num_ranks + 1);
    if (check_layout(layout).ok()) return layout;
  }
}

LoadSeries random_window(RandomBits& random, int64_t layers, int64_t experts) {
  LoadSeries window{zipf_load(random, layers, experts, 1.2 * uniform(random), 1e5)};
  const int64_t samples = 1 + below(random, 6);
  while (std::ssize(window) < samples) window.push_back(drifted(random, window.front(), uniform(random)));
  return window;
}

double mean_peak(const LoadSeries& window, const Placement& placement, int64_t layer) {
  double sum = 0;
  for (const ExpertLoad& load : window) {
    const std::vector<double> loads = rank_loads(load.layer(layer), placement.layer(layer), placement.num_ranks());
    sum += *std::max_element(loads.begin(), loads.end());
  }
  return sum / static_cast<double>(window.size());
}

TEST(PolicyProperties, HoldOnRandomLoads) {
  const uint64_t seed = 41;
  std::printf("seed %lu\n", static_cast<unsigned long>(seed));
  RandomBits random(seed);
  for (int round = 0; round < 400; ++round) {
    SCOPED_TRACE(fmt::format("seed {} round {}", seed, round));
    const Layout layout = random_layout(random);
    const LoadSeries old_window = random_window(random, 2, layout.num_experts);
    const LoadSeries window = random_window(random, 2, layout.num_experts);
    const Placement initial = Placement::initial(2, layout);
    for (const Policy policy : kPolicies) {
      SCOPED_TRACE(policy_name(policy));
      const Placement current = rebalance(policy, {old_window, layout, initial});
      const Placement next = rebalance(policy, {window, layout, current});
      ASSERT_TRUE(next.check().ok());  // every expert is there, every slot is filled
      ASSERT_TRUE(next.fits(layout));
      ASSERT_EQ(rebalance(policy, {window, layout, current}), next);  // a pure function
      if (policy == Policy::kDefault) continue;
      ASSERT_FALSE(has_duplicates(next));
      // Also from a placement that has them.
      ASSERT_FALSE(has_duplicates(
          rebalance(policy, {window, layout, rebalance(Policy::kDefault, {old_window, layout, initial})})));
      for (int64_t l = 0; l < 2; ++l) {
        if (policy == Policy::kFlash) {
          ASSERT_LE(mean_peak(window, next, l), mean_peak(window, current, l) * (1 + 1e-12));
        } else {
          ASSERT_GE(report_balance(sum_of(window), next).layers[static_cast<size_t>(l)] * (1 + 1e-12),
                    report_balance(sum_of(window), current).layers[static_cast<size_t>(l)]);
        }
      }
    }
  }
}

// A load that is scaled is the same problem; and a rebalance of what it has just placed moves nothing.
TEST(PolicyProperties, SettleAndDoNotDependOnTheUnit) {
  const uint64_t seed = 42;
  std::printf("seed %lu\n", static_cast<unsigned long>(seed));
  RandomBits random(seed);
  for (int round = 0; round < 100; ++round) {
    SCOPED_TRACE(fmt::format("seed {} round {}", seed, round));
    const Layout layout = random_layout(random);
    const LoadSeries window = random_window(random, 2, layout.num_experts);
    LoadSeries doubled = window;
    for (size_t i = 0; i < window.size(); ++i) doubled[i].add(window[i]);
    const Placement initial = Placement::initial(2, layout);
    for (const Policy policy : kPolicies) {
      SCOPED_TRACE(policy_name(policy));
      const Placement next = rebalance(policy, {window, layout, initial});
      ASSERT_EQ(rebalance(policy, {doubled, layout, initial}), next);
      const bool settles = policy == Policy::kSwift;
      ASSERT_TRUE(!settles || rebalance(policy, {window, layout, next}) == next);
    }
  }
}

TEST(PolicyProperties, LayersWithoutTokensAndWithOneBusyExpert) {
  const Layout layout{8, 8, 4};
  ExpertLoad load(2, 8);
  load.layer(1)[5] = 1000;
  const LoadSeries window{load, load};
  for (const Policy policy : kPolicies) {
    SCOPED_TRACE(policy_name(policy));
    const Placement next = rebalance(policy, {window, layout, Placement::initial(2, layout)});
    ASSERT_TRUE(next.check().ok());
    // Swift and flash may have four copies, one on each rank.
    EXPECT_TRUE(policy == Policy::kDefault || report_balance(load, next).layers[1] == 1);
  }
}

// Loads that change somewhat from window to window, as measured ones do: `default` places nearly everything anew.
TEST(PolicyProperties, SwiftAndFlashMoveLessThanDefault) {
  const uint64_t seed = 43;
  std::printf("seed %lu\n", static_cast<unsigned long>(seed));
  RandomBits random(seed);
  for (const double drift : {0.02, 0.2, 0.8}) {
    for (const Layout& layout : {Layout{64, 8, 8}, Layout{128, 16, 16}, Layout{256, 32, 32}}) {
      std::map<Policy, int64_t> moves;
      std::map<Policy, double> balance;
      constexpr int kRounds = 5;
      std::map<Policy, Placement> current;
      for (const Policy policy : kPolicies) current[policy] = Placement::initial(4, layout);
      const ExpertLoad base = zipf_load(random, 4, layout.num_experts, 0.6);
      for (int round = 0; round < kRounds; ++round) {
        LoadSeries window;
        const ExpertLoad now = drifted(random, base, drift);
        for (int i = 0; i < 4; ++i) window.push_back(drifted(random, now, drift / 2));
        for (const Policy policy : kPolicies) {
          Placement next = rebalance(policy, {window, layout, current[policy]});
          keep_slots(current[policy], next);
          moves[policy] += plan_moves(current[policy], next, 1).num_remote();
          balance[policy] += report_balance(sum_of(window), next).overall / kRounds;
          current[policy] = std::move(next);
        }
      }
      std::printf("drift %.2f, %3ld experts, %2ld ranks: ", drift, static_cast<long>(layout.num_experts),
                  static_cast<long>(layout.num_ranks));
      for (const Policy policy : kPolicies) {
        std::printf(" %s %.3f, %ld moves;", policy_name(policy), balance[policy], static_cast<long>(moves[policy]));
      }
      std::printf("\n");
      EXPECT_LT(moves[Policy::kSwift], moves[Policy::kDefault]);
      EXPECT_LT(moves[Policy::kFlash], moves[Policy::kDefault]);
    }
  }
}

// Half of the experts are busy in the first half of the samples, the others in the second: what a step waits for is
// less with `flash`, which alone sees that.
TEST(PolicyProperties, FlashWaitsLessForExpertsThatRiseTogether) {
  const uint64_t seed = 44;
  std::printf("seed %lu\n", static_cast<unsigned long>(seed));
  RandomBits random(seed);
  const Layout layout{64, 8, 8};
  const ExpertLoad base = zipf_load(random, 4, 64, 0.6);
  std::vector<uint8_t> is_early(64);
  for (uint8_t& early : is_early) early = static_cast<uint8_t>(below(random, 2));
  LoadSeries window;
  for (int t = 0; t < 16; ++t) {
    ExpertLoad sample = drifted(random, base, 0.1);
    for (int64_t l = 0; l < 4; ++l) {
      for (size_t e = 0; e < 64; ++e) sample.layer(l)[e] *= (is_early[e] != 0) == (t < 8) ? 3 : 1;
    }
    window.push_back(std::move(sample));
  }
  const Placement initial = Placement::initial(4, layout);
  std::map<Policy, double> wait;
  const double mean = static_cast<double>(sum_of(window).total()) / 16 / 8;
  for (const Policy policy : kPolicies) {
    const Placement next = rebalance(policy, {window, layout, initial});
    for (int64_t l = 0; l < 4; ++l) wait[policy] += mean_peak(window, next, l);
    std::printf("%s: mean over the samples of mean / max %.3f\n", policy_name(policy), mean / wait[policy]);
  }
  EXPECT_LT(wait[Policy::kFlash], 0.97 * wait[Policy::kDefault]);
  EXPECT_LT(wait[Policy::kFlash], 0.97 * wait[Policy::kSwift]);
}

// The least possible fullest rank, over all numbers of copies and all placements without two copies on a rank.
double best_peak(const std::vector<int64_t>& tokens, const Layout& layout) {
  double best = 1e300;
  const size_t experts = tokens.size();
  const size_t ranks = static_cast<size_t>(layout.num_ranks);
  std::vector<uint32_t> holders(experts);  // of each expert: bit per rank
  const std::function<void(size_t, std::vector<int64_t>)> place = [&](size_t e, std::vector<int64_t> room) {
    if (e == experts) {
      if (*std::max_element(room.begin(), room.end()) > 0) return;
      std::vector<double> loads(ranks);
      for (size_t i = 0; i < experts; ++i) {
        const int copies = __builtin_popcount(holders[i]);
        for (size_t r = 0; r < ranks; ++r) {
          if ((holders[i] >> r & 1) != 0) loads[r] += static_cast<double>(tokens[i]) / copies;
        }
      }
      best = std::min(best, *std::max_element(loads.begin(), loads.end()));
      return;
    }
    for (uint32_t set = 1; set < 1U << ranks; ++set) {
      std::vector<int64_t> left = room;
      bool fits = true;
      for (size_t r = 0; r < ranks; ++r) {
        if ((set >> r & 1) != 0) fits = --left[r] >= 0 && fits;
      }
      if (!fits) continue;
      holders[e] = set;
      place(e + 1, std::move(left));
    }
  };
  place(0, std::vector<int64_t>(ranks, layout.slots_per_rank()));
  return best;
}

TEST(PolicyProperties, NearTheBestOfSmallCases) {
  const uint64_t seed = 45;
  std::printf("seed %lu\n", static_cast<unsigned long>(seed));
  RandomBits random(seed);
  std::map<Policy, double> worst;
  std::map<Policy, double> sum;
  int cases = 0;
  while (cases < 200) {
    const Layout layout{3 + below(random, 4), below(random, 5), 2 + below(random, 2)};
    if (!check_layout(layout).ok()) continue;
    ++cases;
    const LoadSeries window{zipf_load(random, 1, layout.num_experts, 1.5 * uniform(random), 1000)};
    const std::span<const int64_t> tokens = window[0].layer(0);
    const double best = best_peak({tokens.begin(), tokens.end()}, layout);
    for (const Policy policy : kPolicies) {
      const Placement next = rebalance(policy, {window, layout, Placement::initial(1, layout)});
      const double ratio = mean_peak(window, next, 0) / best;
      // `default` may put two copies on one rank, which the best may not.
      ASSERT_TRUE(policy == Policy::kDefault || ratio >= 1 - 1e-9) << "seed " << seed << " case " << cases;
      worst[policy] = std::max(worst[policy], ratio);
      sum[policy] += ratio;
    }
  }
  for (const Policy policy : kPolicies) {
    std::printf("%-8s fullest rank against the best possible: mean %.3f, worst %.3f of %d cases\n", policy_name(policy),
                sum[policy] / cases, worst[policy], cases);
  }
  EXPECT_LE(sum[Policy::kDefault] / cases, 1.15);
  EXPECT_LE(sum[Policy::kSwift] / cases, 1.15);
  EXPECT_LE(sum[Policy::kFlash] / cases, 1.05);
  EXPECT_LE(sum[Policy::kFlash], sum[Policy::kSwift]);
}

}  // namespace
}  // namespace tandem::eplb
