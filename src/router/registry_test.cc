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

TEST(Policy, NamesAreThoseOfTheOption) {
  for (const char* name :
       {"round_robin", "least_load", "power_of_two", "prefix_aware", "weighted_round_robin", "session"}) {
    EXPECT_STREQ(policy_name(parse_policy(name).value()), name);
  }
  EXPECT_EQ(parse_policy("best").error().param, "policy");
}

TEST(Policy, PowerOfTwoSeldomTakesTheBusiest) {
  Policy policy(PolicyKind::kPowerOfTwo, 7);
  std::vector<int> picks(4, 0);
  for (int i = 0; i < 4000; ++i) {
    ++picks[static_cast<size_t>(
        policy.pick(std::vector<Candidate>{{WorkerId(0), 9}, {WorkerId(1), 1}, {WorkerId(2), 5}, {WorkerId(3), 7}})
            .value)];
  }
  EXPECT_EQ(picks[0], 0);  // loses every comparison
  EXPECT_NEAR(picks[1], 2000, 150);
  EXPECT_NEAR(picks[2], 1333, 150);
  EXPECT_NEAR(picks[3], 667, 150);
}

TEST(Policy, PrefixAwareWeighsTheCacheAgainstTheLoad) {
  Policy policy(PolicyKind::kPrefixAware);
  const auto pick = [&](int64_t load0, int64_t cached0, int64_t load1, int64_t cached1) {
    return policy.pick(std::vector<Candidate>{{WorkerId(0), load0, 1, cached0}, {WorkerId(1), load1, 1, cached1}})
        .value;
  };
  EXPECT_EQ(pick(100, 64, 50, 0), 0);  // 36 against 50
  EXPECT_EQ(pick(200, 64, 50, 0), 1);  // too busy for its cache
  EXPECT_EQ(pick(10, 0, 50, 48), 1);
}

TEST(Policy, WeightsAreSharesSpreadEvenly) {
  Policy policy(PolicyKind::kWeightedRoundRobin);
  const std::vector<Candidate> candidates = {{WorkerId(0), 0, 3}, {WorkerId(1), 0, 1}};
  EXPECT_EQ(pick_many(policy, candidates, 8), (std::vector<int32_t>{0, 0, 1, 0, 0, 0, 1, 0}));
}

TEST(Policy, ASessionStaysAndMovesOnlyWithItsWorker) {
  Policy policy(PolicyKind::kSession);
  const std::vector<Candidate> all = {{WorkerId(0)}, {WorkerId(1)}, {WorkerId(2)}, {WorkerId(3)}};
  const std::vector<Candidate> fewer = {all[0], all[1], all[3]};
  std::vector<int> share(4, 0);
  for (uint64_t session = 1; session <= 1000; ++session) {
    const WorkerId home = policy.pick(all, session * 0x9E3779B97F4A7C15ULL);
    EXPECT_EQ(policy.pick(all, session * 0x9E3779B97F4A7C15ULL), home);
    const WorkerId without = policy.pick(fewer, session * 0x9E3779B97F4A7C15ULL);
    EXPECT_TRUE(without == home || home == WorkerId(2));
    ++share[static_cast<size_t>(home.value)];
  }
  for (const int count : share) EXPECT_NEAR(count, 250, 60);
}

TEST(PrefixIndex, KnowsWholeBlocksFromTheStart) {
  std::vector<TokenId> prompt(40);
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<TokenId>(i);
  PrefixIndex index;
  index.add(hash_prompt_blocks(prompt, ""));
  EXPECT_EQ(index.cached_tokens(hash_prompt_blocks(prompt, "")), 32);
  EXPECT_EQ(index.cached_tokens(hash_prompt_blocks(prompt, "salt")), 0);
  prompt[20] = 99;
  EXPECT_EQ(index.cached_tokens(hash_prompt_blocks(prompt, "")), 16);
  prompt[0] = 99;
  EXPECT_EQ(index.cached_tokens(hash_prompt_blocks(prompt, "")), 0);
}

TEST(PrefixIndex, ForgetsTheOldestHalfWhenFull) {
  PrefixIndex index;
  std::vector<uint64_t> block(1);
  for (uint64_t i = 0; i < 2 * PrefixIndex::kMaxBlocks + 1; ++i) {
    block[0] = i * 0x9E3779B97F4A7C15ULL;
    index.add(block);
  }
  EXPECT_EQ(index.cached_tokens(block), PrefixIndex::kBlockTokens);
  block[0] = 0;
  EXPECT_EQ(index.cached_tokens(block), 0);
}

TEST(CircuitBreaker, OpensAfterFailuresInARowAndTriesOneAtATime) {
  CircuitBreaker breaker({.failures_to_open = 3, .open_us = 100, .trial_us = 10});
  EXPECT_FALSE(breaker.record(false, 0));
  EXPECT_FALSE(breaker.record(true, 0));
  EXPECT_FALSE(breaker.record(false, 0));
  EXPECT_FALSE(breaker.record(false, 0));
  EXPECT_TRUE(breaker.allows(0));
  EXPECT_TRUE(breaker.record(false, 0));
  EXPECT_FALSE(breaker.allows(99));
  EXPECT_TRUE(breaker.allows(100));
  breaker.begin(100);
  EXPECT_FALSE(breaker.allows(109));
  EXPECT_TRUE(breaker.allows(110));  // the trial was cancelled, or nothing is known of it
  EXPECT_FALSE(breaker.record(false, 110));
  EXPECT_FALSE(breaker.allows(209));
  EXPECT_TRUE(breaker.record(true, 210));
  EXPECT_TRUE(breaker.allows(210));
}

TEST(RetryBudget, AllowsAShareAndABurst) {
  RetryBudget budget(0.25);
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(budget.take());
  EXPECT_FALSE(budget.take());
  for (int i = 0; i < 4; ++i) budget.request();
  EXPECT_TRUE(budget.take());
  EXPECT_FALSE(budget.take());
}

// Makes the context of a pick after the given workers have failed.
class Excluding {
 public:
  explicit Excluding(WorkerId worker) : workers_{worker} {}
  PickContext context() const { return {.excluded = workers_}; }

 private:
  std::vector<WorkerId> workers_;
};

TEST(WorkerRegistry, PicksHealthyWorkersOfTheRole) {
  WorkerRegistry registry({});
  const WorkerId p = registry.add(Role::kPrefill, "p").value();
  const WorkerId d0 = registry.add(Role::kDecode, "d0").value();
  const WorkerId d1 = registry.add(Role::kDecode, "d1").value();
  EXPECT_EQ(registry.pick(Role::kDecode, {}).error().kind, ErrorKind::kUnavailable);
  EXPECT_EQ(registry.pick(Role::kDecode, {}).error().message,
            "no decode worker is available (2 known); try again later");
  for (const WorkerId id : {p, d0, d1}) registry.worker(id).tracker.record(true);
  EXPECT_TRUE(registry.has_healthy(Role::kPrefill));
  EXPECT_EQ(*registry.pick(Role::kPrefill, {}), p);
  const LoadToken busy = registry.acquire(d0, 100);
  EXPECT_EQ(*registry.pick(Role::kDecode, {}), d1);
  EXPECT_EQ(*registry.pick(Role::kDecode, Excluding(d1).context()), d0);
  registry.worker(d0).tracker.record(false);
  registry.worker(d0).tracker.record(false);
  EXPECT_FALSE(registry.pick(Role::kDecode, Excluding(d1).context()).ok());
}

TEST(WorkerRegistry, KeepsPairsApartThatFailTwice) {
  WorkerRegistry registry({});
  const WorkerId p0 = registry.add(Role::kPrefill, "p0").value();
  const WorkerId p1 = registry.add(Role::kPrefill, "p1").value();
  const WorkerId d0 = registry.add(Role::kDecode, "d0").value();
  const WorkerId d1 = registry.add(Role::kDecode, "d1").value();
  for (const WorkerId id : {p0, p1, d0, d1}) registry.worker(id).tracker.record(true);
  registry.record_pair(p0, d0, false, 0);
  EXPECT_TRUE(registry.has_open(Role::kPrefill, {.now_us = 0, .partner = d0}));
  registry.record_pair(p0, d0, false, 0);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(registry.pick(Role::kPrefill, {.now_us = 0, .partner = d0}).value(), p1);
  EXPECT_EQ(registry.pick(Role::kPrefill, {.now_us = 0, .partner = d1}).value(), p0);
  EXPECT_EQ(registry.num_bad_pairs(), 1u);
  registry.record_pair(p0, d0, true, 0);
  EXPECT_EQ(registry.num_bad_pairs(), 0u);
}

TEST(WorkerRegistry, DrainsAndTakesBackWorkers) {
  WorkerRegistry registry({});
  const WorkerId d0 = registry.add(Role::kDecode, "d0").value();
  registry.worker(d0).tracker.record(true);
  EXPECT_EQ(registry.add(Role::kDecode, "d0").error().message, "decode worker d0 is given twice");
  {
    const LoadToken busy = registry.acquire(d0, 10);
    registry.drain(d0);
    EXPECT_EQ(registry.worker(d0).membership, Membership::kDraining);
    EXPECT_FALSE(registry.pick(Role::kDecode, {}).ok());
    EXPECT_FALSE(registry.has_role(Role::kDecode));
  }
  registry.settle(d0);
  EXPECT_EQ(registry.worker(d0).membership, Membership::kRemoved);
  EXPECT_EQ(registry.add(Role::kDecode, "d0", 2).value(), d0);
  EXPECT_FALSE(registry.pick(Role::kDecode, {}).ok());  // until a probe has found it
  registry.worker(d0).tracker.record(true);
  EXPECT_EQ(registry.pick(Role::kDecode, {}).value(), d0);
}

TEST(LoadToken, ReturnsToZeroHoweverItIsHandedOn) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  WorkerRegistry registry({});
  const WorkerId id = registry.add(Role::kDecode, "d").value();
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
