#include "src/eplb/moves.h"

#include <gtest/gtest.h>

#include <map>

#include "src/eplb/policy.h"
#include "src/eplb/test_support.h"

namespace tandem::eplb {
namespace {

Placement placement_of(const Layout& layout, const std::vector<int32_t>& slots) {
  Placement placement(1, layout);
  std::copy(slots.begin(), slots.end(), placement.layer(0).begin());
  return placement;
}

TEST(Moves, NothingForTheSamePlacement) {
  const Placement placement = Placement::initial(3, {8, 0, 4});
  const MovePlan plan = plan_moves(placement, placement, 1);
  EXPECT_EQ(plan.num_remote() + plan.num_local(), 0);
  EXPECT_EQ(plan.layers.size(), 3U);
}

TEST(Moves, TellsLocalFromRemote) {
  const Layout layout{4, 0, 2};
  const MovePlan plan = plan_moves(placement_of(layout, {0, 1, 2, 3}), placement_of(layout, {1, 2, 0, 3}), 1);
  EXPECT_EQ(plan.layers[0].local, (std::vector<Move>{{0, 1, 1}}));
  EXPECT_EQ(plan.layers[0].remote, (std::vector<Move>{{1, 2, 2}, {2, 0, 0}}));
}

TEST(Moves, SpreadsReceiversOverTheRanksThatHaveTheExpert) {
  // Expert 0 on ranks 0 and 1; ranks 2 … 5 want it.
  const Layout layout{5, 1, 6};
  const MovePlan plan =
      plan_moves(placement_of(layout, {0, 0, 1, 2, 3, 4}), placement_of(layout, {1, 2, 0, 0, 0, 0}), 1);
  std::map<int32_t, int> sent;
  for (const Move& move : plan.layers[0].remote) {
    if (move.expert == 0) ++sent[move.source_slot];
  }
  EXPECT_EQ(sent, (std::map<int32_t, int>{{0, 2}, {1, 2}}));
}

TEST(Moves, PrefersTheOwnNode) {
  const Layout layout{3, 1, 4, 2};
  // Expert 0 on rank 0 (node 0) and 2 (node 1).
  const MovePlan plan = plan_moves(placement_of(layout, {0, 1, 0, 2}), placement_of(layout, {1, 0, 2, 0}), 2);
  EXPECT_EQ(plan.layers[0].remote, (std::vector<Move>{{0, 1, 1}, {1, 0, 0}, {2, 2, 3}, {3, 0, 2}}));
}

// Carrying a plan out on slots gives the new placement, from slots that hold what is asked of them.
TEST(Moves, ReachTheNewPlacement) {
  const uint64_t seed = 31;
  SCOPED_TRACE(fmt::format("seed {}", seed));
  RandomBits random(seed);
  for (int round = 0; round < 100; ++round) {
    const int64_t ranks = 1 + below(random, 12);
    const int64_t experts = ranks * (1 + below(random, 4));
    const Layout layout{experts, ranks * below(random, 2), ranks};
    if (!check_layout(layout).ok()) continue;
    const LoadSeries first{zipf_load(random, 2, experts, 0.8)};
    const LoadSeries second{zipf_load(random, 2, experts, 0.8)};
    const Placement from = rebalance(Policy::kDefault, {first, layout, Placement::initial(2, layout)});
    const Placement to = rebalance(Policy::kDefault, {second, layout, from});
    const MovePlan plan = plan_moves(from, to, 1);
    for (int64_t l = 0; l < 2; ++l) {
      std::vector<int32_t> slots(from.layer(l).begin(), from.layer(l).end());
      const LayerMoves& moves = plan.layers[static_cast<size_t>(l)];
      for (const std::vector<Move>* list : {&moves.local, &moves.remote}) {
        for (const Move& move : *list) {
          ASSERT_EQ(from.layer(l)[static_cast<size_t>(move.source_slot)], move.expert);
          const bool same_rank = move.source_slot / layout.slots_per_rank() == move.slot / layout.slots_per_rank();
          ASSERT_EQ(same_rank, list == &moves.local);
          slots[static_cast<size_t>(move.slot)] = move.expert;
        }
      }
      ASSERT_EQ(slots, std::vector<int32_t>(to.layer(l).begin(), to.layer(l).end()));
    }
  }
}

}  // namespace
}  // namespace tandem::eplb
