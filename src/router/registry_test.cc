#include "src/router/registry.h"

#include <gtest/gtest.h>

#include <random>

namespace tandem::router {
namespace {

std::vector<int32_t> pick_many(Policy& policy, const std::vector<Candidate>& candidates, int count) {
  std::vector<int32_t> picks;
  for (int i = 0; i < count; ++i) picks.push_back(policy.pick(candidates).value);
  return picks;
}

TEST(Policy, RoundRobinGoesInTurnAndSkipsTheMissing) {
  Policy policy(PolicyKind::kRoundRobin);
  const std::vector<Candidate> all = {{WorkerId(0), 9}, {WorkerId(1), 0}, {WorkerId(2), 5}};
  EXPECT_EQ(pick_many(policy, all, 4), (std::vector<int32_t>{0, 1, 2, 0}));
  EXPECT_EQ(pick_many(policy, {all[0], all[2]}, 3), (std::vector<int32_t>{2, 0, 2}));
}

TEST(Policy, LeastLoadTakesTheLeastAndTurnsAmongEquals) {
  Policy policy(PolicyKind::kLeastLoad);
  EXPECT_EQ(pick_many(policy, {{WorkerId(0), 7}, {WorkerId(1), 3}, {WorkerId(2), 4}}, 2), (std::vector<int32_t>{1, 1}));
  EXPECT_EQ(pick_many(policy, {{WorkerId(0), 3}, {WorkerId(1), 3}, {WorkerId(2), 4}}, 4),
            (std::vector<int32_t>{0, 1, 0, 1}));
}

TEST(Health, NeedsTwoFailuresAndTwoSuccesses) {
  HealthTracker tracker;
  EXPECT_EQ(tracker.health(), Health::kUnknown);
  EXPECT_FALSE(tracker.record(false));
  EXPECT_TRUE(tracker.record(true));
  EXPECT_EQ(tracker.health(), Health::kUp);
  EXPECT_FALSE(tracker.record(false));
  EXPECT_FALSE(tracker.record(true));
  EXPECT_FALSE(tracker.record(false));
  EXPECT_TRUE(tracker.record(false));
  EXPECT_EQ(tracker.health(), Health::kDown);
  EXPECT_FALSE(tracker.record(true));
  EXPECT_FALSE(tracker.record(false));
  EXPECT_FALSE(tracker.record(true));
  EXPECT_TRUE(tracker.record(true));
  EXPECT_EQ(tracker.health(), Health::kUp);
}

TEST(WorkerRegistry, PicksHealthyWorkersOfTheRole) {
  WorkerRegistry registry(PolicyKind::kLeastLoad);
  const WorkerId p = registry.add(Role::kPrefill, "p");
  const WorkerId d0 = registry.add(Role::kDecode, "d0");
  const WorkerId d1 = registry.add(Role::kDecode, "d1");
  EXPECT_EQ(registry.pick(Role::kDecode, {}).error().kind, ErrorKind::kUnavailable);
  EXPECT_EQ(registry.pick(Role::kDecode, {}).error().message,
            "no decode worker is available (2 known); try again later");
  for (const WorkerId id : {p, d0, d1}) registry.worker(id).tracker.record(true);
  EXPECT_TRUE(registry.has_healthy(Role::kPrefill));
  EXPECT_EQ(*registry.pick(Role::kPrefill, {}), p);
  const LoadToken busy = registry.acquire(d0, 100);
  EXPECT_EQ(*registry.pick(Role::kDecode, {}), d1);
  EXPECT_EQ(*registry.pick(Role::kDecode, std::vector<WorkerId>{d1}), d0);
  registry.worker(d0).tracker.record(false);
  registry.worker(d0).tracker.record(false);
  EXPECT_FALSE(registry.pick(Role::kDecode, std::vector<WorkerId>{d1}).ok());
}

TEST(LoadToken, ReturnsToZeroHoweverItIsHandedOn) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  WorkerRegistry registry(PolicyKind::kLeastLoad);
  const WorkerId id = registry.add(Role::kDecode, "d");
  int64_t tokens = 0;
  {
    std::vector<LoadToken> held;
    for (int i = 0; i < 1000; ++i) {
      const int64_t amount = static_cast<int64_t>(random() % 1000);
      held.push_back(registry.acquire(id, amount));
      held[random() % held.size()].grow(3);
      tokens += amount + 3;
      std::swap(held[random() % held.size()], held.back());
    }
    EXPECT_EQ(registry.worker(id).load->requests, 1000);
    EXPECT_EQ(registry.worker(id).load->tokens, tokens);
    held[3] = std::move(held[4]);
    held[5].release();
    held[5].release();
    held[5].grow(7);
    EXPECT_EQ(registry.worker(id).load->requests, 998);
  }
  EXPECT_EQ(registry.worker(id).load->requests, 0);
  EXPECT_EQ(registry.worker(id).load->tokens, 0);
}

}  // namespace
}  // namespace tandem::router
