#include "src/group/mapped_fabric.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "src/group/step_agreement.h"
#include "src/group/test_support.h"

namespace tandem::group {
namespace {

using testing::HasSubstr;

// Two ranks may look before they sleep on a machine with two processors; five sleep at once on most.
class MappedFabricSizes : public testing::TestWithParam<int32_t> {};
INSTANTIATE_TEST_SUITE_P(Ranks, MappedFabricSizes, testing::Values(2, 3, 5));

TEST_P(MappedFabricSizes, WhatWasWrittenBeforeTheSignalIsThere) {
  ThreadGroup group(GetParam(), 4096);
  group.run([](Fabric& fabric) {
    for (uint64_t round = 1; round <= 2000; ++round) {
      const int64_t value = static_cast<int64_t>(round) * 10 + fabric.rank().value;
      for (int32_t to = 0; to < fabric.size(); ++to) {
        // Two places in turn: a rank may be one round ahead.
        const int64_t offset = (fabric.rank().value * 2 + static_cast<int64_t>(round % 2)) * 8;
        fabric.put(RankId(to), offset, std::as_bytes(std::span(&value, 1)));
        fabric.signal(RankId(to), Channel::kBarrier, round);
      }
      for (int32_t from = 0; from < fabric.size(); ++from) {
        ASSERT_TRUE(fabric.wait(RankId(from), Channel::kBarrier, round).ok());
        int64_t got = 0;
        std::memcpy(&got, fabric.window().data() + (from * 2 + static_cast<int64_t>(round % 2)) * 8, 8);
        ASSERT_EQ(got, static_cast<int64_t>(round) * 10 + from);
      }
    }
  });
}

TEST(MappedFabric, NamesTheRankThatDoesNotMove) {
  ThreadGroup group(2, 64, FabricLimits{.rank_timeout_us = 100'000});
  const Status status = group.fabric(0).wait(RankId(1), Channel::kDispatch, 1);
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().kind, ErrorKind::kUnavailable);
  EXPECT_THAT(status.error().message, HasSubstr("rank 1 has shown no sign of life for 0.1 s"));
  EXPECT_THAT(status.error().message, HasSubstr("dispatch"));
}

TEST(MappedFabric, WaitsForASlowRankThatShowsLife) {
  ThreadGroup group(2, 64, FabricLimits{.rank_timeout_us = 100'000});
  std::thread slow([&] {
    for (int i = 0; i < 10; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(40));
      group.fabric(1).beat();
    }
    group.fabric(1).signal(RankId(0), Channel::kCombine, 1);
  });
  EXPECT_TRUE(group.fabric(0).wait(RankId(1), Channel::kCombine, 1).ok());
  slow.join();
}

TEST(MappedFabric, GivesUpARankThatLivesButNeverSends) {
  ThreadGroup group(2, 64, FabricLimits{.rank_timeout_us = 60'000});
  // Both wait for each other: each shows life, neither sends.
  group.run([](Fabric& fabric) {
    const Status status = fabric.wait(RankId(1 - fabric.rank().value), Channel::kCombine, 1);
    ASSERT_FALSE(status.ok());
  });
}

TEST(MappedFabric, TheEndOfTheEpochEndsEveryWait) {
  ThreadGroup group(2, 64);
  std::thread ender([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    group.fabric(0).end(make_error(ErrorKind::kUnavailable, "rank 1 is gone"));
  });
  const Status status = group.fabric(0).wait(RankId(1), Channel::kStep, 1);
  ender.join();
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().message, "rank 1 is gone");
  // Also what has arrived is of the ended epoch.
  group.fabric(1).signal(RankId(0), Channel::kStep, 1);
  EXPECT_FALSE(group.fabric(0).wait(RankId(1), Channel::kStep, 1).ok());
}

TEST(StepAgreement, AllSeeTheSameList) {
  ThreadGroup group(4, StepAgreement::window_bytes(4));
  group.run([](Fabric& fabric) {
    StepAgreement agreement(fabric);
    for (int64_t round = 0; round < 1000; ++round) {
      const Result<std::vector<StepIntent>> intents = agreement.agree({.rows = round * 4 + fabric.rank().value});
      ASSERT_TRUE(intents.ok());
      for (int64_t r = 0; r < 4; ++r) ASSERT_EQ((*intents)[static_cast<size_t>(r)].rows, round * 4 + r);
    }
  });
}

TEST(StepAgreement, CallsRanksThatAreIdle) {
  ThreadGroup group(2, StepAgreement::window_bytes(2));
  StepAgreement idle(group.fabric(1));
  EXPECT_FALSE(idle.is_called());
  std::thread busy([&] { EXPECT_TRUE(StepAgreement(group.fabric(0)).agree({.rows = 5}).ok()); });
  comm::Bell bell(group.bell(1));
  while (!idle.is_called()) bell.wait(bell.count(), 10'000);
  const Result<std::vector<StepIntent>> intents = idle.agree({});
  busy.join();
  ASSERT_TRUE(intents.ok());
  EXPECT_EQ(intents->front().rows, 5);
  EXPECT_FALSE(idle.is_called());
}

}  // namespace
}  // namespace tandem::group
