#include "src/eplb/placement.h"

#include <gtest/gtest.h>

#include <cmath>

#include "src/eplb/assignment.h"
#include "src/eplb/test_support.h"

namespace tandem::eplb {
namespace {

std::string error_of(const Layout& layout) {
  const Status status = check_layout(layout);
  return status.ok() ? "no error" : status.error().message;
}

TEST(Layout, SaysWhatWouldDo) {
  EXPECT_EQ(error_of({256, 32, 32}), "no error");
  EXPECT_EQ(error_of({256, 30, 32}),
            "256 experts and 30 redundant ones do not divide evenly by 32 ranks; take 0 or 32 redundant experts");
  EXPECT_EQ(error_of({10, 0, 4}),
            "10 experts and 0 redundant ones do not divide evenly by 4 ranks; take 2 redundant experts");
  EXPECT_EQ(error_of({4, 0, 8}),
            "8 ranks, but only 4 slots (4 experts and 0 redundant): a rank would be empty; take at most 4 ranks or 4 "
            "redundant experts");
  EXPECT_EQ(
      error_of({4, 6, 2}),
      "6 redundant experts give each of 2 ranks 5 slots for 4 experts, more than one copy of each; take at most 4");
  EXPECT_EQ(error_of({4, -1, 1}), "-1 redundant experts; from 0 to 16380 are possible with 4 experts");
  EXPECT_EQ(error_of({4, 0, 0}), "ranks is 0; it must be from 1 to 4096");
  EXPECT_EQ(error_of({4, 0, 2, 3}), "nodes is 3; it must be from 1 to 2");
  EXPECT_EQ(error_of({4, 0, 2, 1, 5}), "groups is 5; it must be from 1 to 4");
}

TEST(Placement, BeginsWithExpertsInOrder) {
  const Placement placement = Placement::initial(1, {4, 2, 3});
  EXPECT_EQ(std::vector<int32_t>(placement.layer(0).begin(), placement.layer(0).end()),
            (std::vector<int32_t>{0, 1, 2, 3, 0, 1}));
  EXPECT_TRUE(placement.check().ok());
  const ReplicaTable table(placement.layer(0), 4);
  EXPECT_EQ(std::vector<int32_t>(table.slots_of(1).begin(), table.slots_of(1).end()), (std::vector<int32_t>{1, 5}));
  EXPECT_EQ(std::vector<int32_t>(table.slots_of(2).begin(), table.slots_of(2).end()), (std::vector<int32_t>{2}));
}

TEST(Placement, RefusesSlotsOfNoExpertAndExpertsWithoutSlot) {
  Placement placement = Placement::initial(2, {4, 0, 2});
  placement.layer(1)[3] = 0;
  EXPECT_EQ(placement.check().error().message, "layer 1 has no slot for expert 3");
  placement.layer(1)[3] = 4;
  EXPECT_EQ(placement.check().error().message, "layer 1 has a slot for expert 4; experts are 0 … 3");
}

TEST(KeepSlots, ReordersOnlyInsideRanks) {
  const Layout layout{6, 0, 2};
  const Placement current = Placement::initial(1, layout);  // 0 1 2 | 3 4 5
  Placement next(1, layout);
  const std::vector<int32_t> wanted{2, 4, 0, 5, 3, 1};
  std::copy(wanted.begin(), wanted.end(), next.layer(0).begin());
  keep_slots(current, next);
  EXPECT_EQ(std::vector<int32_t>(next.layer(0).begin(), next.layer(0).end()), (std::vector<int32_t>{0, 4, 2, 3, 1, 5}));
}

// Each copy gets its share of the tokens within five standard deviations, for consecutive positions and for any expert.
TEST(ChooseCopy, SpreadsPositionsEvenly) {
  constexpr int64_t kPositions = 100'000;
  for (const int32_t copies : {1, 2, 3, 5, 7, 32}) {
    for (const int32_t expert : {0, 1, 17, 255}) {
      std::vector<int64_t> counts(static_cast<size_t>(copies));
      for (int64_t p = 0; p < kPositions; ++p) ++counts[static_cast<size_t>(choose_copy(p, expert, copies))];
      const double share = 1.0 / copies;
      const double allowed = 5 * std::sqrt(kPositions * share * (1 - share));
      for (const int64_t count : counts) {
        EXPECT_LE(std::abs(static_cast<double>(count) - kPositions * share), allowed) << copies << " " << expert;
      }
    }
  }
}

// Tokens that go to the same two experts must not always pair the same copies.
TEST(ChooseCopy, DiffersBetweenExperts) {
  int64_t same = 0;
  for (int64_t p = 0; p < 10'000; ++p) same += choose_copy(p, 3, 2) == choose_copy(p, 4, 2) ? 1 : 0;
  EXPECT_GT(same, 1000);
  EXPECT_LT(same, 9000);
}

// Against all permutations.
TEST(Assignment, IsTheBest) {
  const uint64_t seed = 11;
  SCOPED_TRACE(fmt::format("seed {}", seed));
  RandomBits random(seed);
  for (int round = 0; round < 300; ++round) {
    const int64_t n = 1 + below(random, 6);
    std::vector<int32_t> gains(static_cast<size_t>(n * n));
    for (int32_t& gain : gains) gain = static_cast<int32_t>(below(random, 10));
    std::vector<int32_t> order(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) order[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    const auto sum_of_gains = [&](const std::vector<int32_t>& columns) {
      int64_t sum = 0;
      for (size_t r = 0; r < columns.size(); ++r) {
        sum += gains[r * columns.size() + static_cast<size_t>(columns[r])];
      }
      return sum;
    };
    int64_t best = 0;
    do {
      best = std::max(best, sum_of_gains(order));
    } while (std::next_permutation(order.begin(), order.end()));
    std::vector<int32_t> found = assign_best(gains, n);
    EXPECT_EQ(sum_of_gains(found), best);
    std::sort(found.begin(), found.end());
    std::sort(order.begin(), order.end());
    EXPECT_EQ(found, order);  // each column once
  }
}

TEST(CountEvenNodes, OnlyNeighboursOfEqualNumber) {
  const auto count = [](std::vector<int32_t> first_of_node) { return count_even_nodes(first_of_node); };
  EXPECT_EQ(count({0}), 1);
  EXPECT_EQ(count({0, 0, 0, 0}), 1);
  EXPECT_EQ(count({0, 0, 2, 2}), 2);
  EXPECT_EQ(count({0, 1, 2, 3}), 4);
  EXPECT_EQ(count({0, 0, 0, 3}), 1);        // not equally many
  EXPECT_EQ(count({0, 0, 0, 0, 4, 4}), 1);
  EXPECT_EQ(count({0, 1, 0, 1}), 1);        // not neighbours
  EXPECT_EQ(count({0, 0, 2, 0}), 1);
  EXPECT_EQ(count({1, 1, 2, 2}), 1);        // nonsense
  EXPECT_EQ(count({0, 0, 2, 2, 2, 2}), 1);
}

}  // namespace
}  // namespace tandem::eplb
