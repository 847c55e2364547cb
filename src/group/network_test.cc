// Groups whose ranks are of several nodes: some by mapped windows, some through the network.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <thread>

#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/group/coordinator.h"
#include "src/group/rank_process.h"

namespace tandem::group {
namespace {

constexpr int64_t kTimeoutUs = 1'000'000;
constexpr int64_t kLongUs = 30'000'000;

class GroupOfNodes : public testing::Test {
 protected:
  void SetUp() override { init_log(LogLevel::kError, ""); }

  void start_coordinator(int32_t size, int64_t rank_timeout_us) {
    options.size = size;
    options.rank_timeout_us = rank_timeout_us;
    coordinator = Coordinator::listen({.host = options.host, .shape = {size, 1}, .rank_timeout_us = rank_timeout_us}).value();
    options.port = coordinator->port();
  }
  std::unique_ptr<RankProcess> start_rank(int32_t rank) {
    RankProcessOptions own = options;
    own.rank = rank;
    own.node = rank < options.size / 2 ? "first" : "second";
    return std::make_unique<RankProcess>(own);
  }
  void start_group(int32_t size, int64_t rank_timeout_us) {
    start_coordinator(size, rank_timeout_us);
    for (int32_t r = 0; r < size; ++r) ranks.push_back(start_rank(r));
    wait_for_epoch();
  }
  void wait_for_epoch() {
    for (const std::unique_ptr<RankProcess>& rank : ranks) {
      ASSERT_TRUE(rank->hear("up ", kLongUs)) << rank->said() << coordinator->status().text;
    }
  }
  void work(int64_t rounds) {
    for (const std::unique_ptr<RankProcess>& rank : ranks) rank->tell(fmt::format("work {}", rounds));
    for (const std::unique_ptr<RankProcess>& rank : ranks) {
      ASSERT_TRUE(rank->hear("worked ", kLongUs)) << rank->said() << coordinator->status().text;
    }
  }
  int64_t count_cpu_ticks() const {
    int64_t ticks = 0;
    for (const std::unique_ptr<RankProcess>& rank : ranks) ticks += rank->cpu_ticks();
    return ticks;
  }

  SteadyClock clock;
  RankProcessOptions options;
  std::unique_ptr<Coordinator> coordinator;
  std::vector<std::unique_ptr<RankProcess>> ranks;
};

TEST_F(GroupOfNodes, BothKindsOfRanksInOneGroup) {
  start_group(4, 5'000'000);
  const int64_t begin_us = clock.now_us();
  work(300);
  std::printf("a round of 4 ranks on 2 nodes: %.0f us\n", static_cast<double>(clock.now_us() - begin_us) / 300);
  EXPECT_EQ(coordinator->status().formations, 1);
}

TEST_F(GroupOfNodes, OneRankPerNode) {
  start_group(2, 5'000'000);
  work(300);
}

TEST_F(GroupOfNodes, AnIdleGroupSleeps) {
  start_group(4, 10'000'000);
  work(10);
  const int64_t before = count_cpu_ticks();
  constexpr int64_t kSeconds = 4;
  std::this_thread::sleep_for(std::chrono::seconds(kSeconds));
  const double share =
      static_cast<double>(count_cpu_ticks() - before) / static_cast<double>(::sysconf(_SC_CLK_TCK) * kSeconds);
  std::printf("idle group of 4 on 2 nodes: %.3f %% of one core\n", share * 100);
  EXPECT_LT(share, 0.01);
}

TEST_F(GroupOfNodes, AKilledAndAStoppedRankAreNamed) {
  start_group(4, kTimeoutUs);
  for (const auto& rank : ranks) rank->tell("work 1000000");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  int64_t begin_us = clock.now_us();
  ranks[2]->kill(SIGKILL);
  for (const size_t r : {0U, 1U, 3U}) {
    ASSERT_TRUE(ranks[r]->hear_of("rank 2 is gone: its connection was closed", kLongUs)) << ranks[r]->said();
    EXPECT_LE(clock.now_us() - begin_us, kTimeoutUs);
  }
  ranks[2] = start_rank(2);
  wait_for_epoch();
  work(20);
  for (const auto& rank : ranks) rank->tell("work 1000000");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  begin_us = clock.now_us();
  ranks[3]->signal(SIGSTOP);
  for (const size_t r : {0U, 1U, 2U}) {
    ASSERT_TRUE(ranks[r]->hear_of("rank 3 is gone: silent for", kLongUs)) << ranks[r]->said();
    EXPECT_LE(clock.now_us() - begin_us, kTimeoutUs);
  }
  ranks[3]->signal(SIGCONT);
  wait_for_epoch();
  work(20);
}

}  // namespace
}  // namespace tandem::group
