// Groups whose ranks are of several nodes: some by mapped windows, some through the network.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

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

// --- two network namespaces and a cable between them ---

class GroupOfHosts : public GroupOfNodes {
 protected:
  void SetUp() override {
    GroupOfNodes::SetUp();
    if (::geteuid() != 0 || !ip("netns add " + host(0)) || !ip("netns add " + host(1))) {
      GTEST_SKIP() << "network namespaces need root and iproute2";
    }
    ASSERT_TRUE(ip(fmt::format("link add tdm-v0 netns {} type veth peer name tdm-v1 netns {}", host(0), host(1))));
    for (int i = 0; i < 2; ++i) {
      ASSERT_TRUE(ip(fmt::format("-n {} addr add 10.78.0.{}/24 dev tdm-v{}", host(i), i + 1, i)));
      ASSERT_TRUE(ip(fmt::format("-n {} link set tdm-v{} up", host(i), i)));
      ASSERT_TRUE(ip(fmt::format("-n {} link set lo up", host(i))));
    }
    options.host = "10.78.0.1";
    // The coordinator's thread and sockets are of the namespace in which they are made.
    const int home = ::open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    const int there = ::open(("/run/netns/" + host(0)).c_str(), O_RDONLY | O_CLOEXEC);
    ASSERT_EQ(::setns(there, CLONE_NEWNET), 0);
    start_coordinator(4, kTimeoutUs);
    ASSERT_EQ(::setns(home, CLONE_NEWNET), 0);
    ::close(home);
    ::close(there);
    for (int32_t r = 0; r < 4; ++r) ranks.push_back(start_rank_there(r));
    wait_for_epoch();
  }
  void TearDown() override {
    ranks.clear();
    coordinator.reset();
    for (int i = 0; i < 2; ++i) ip("netns del " + host(i));
  }

  std::unique_ptr<RankProcess> start_rank_there(int32_t rank) {
    options.before = {"ip", "netns", "exec", host(rank / 2)};
    return start_rank(rank);
  }
  static std::string host(int i) { return fmt::format("tdm-test-{}-{}", ::getpid(), i); }
  static bool ip(const std::string& arguments) { return std::system(("ip " + arguments + " 2>/dev/null").c_str()) == 0; }
  static bool set_link(const char* state) { return ip(fmt::format("-n {} link set tdm-v0 {}", host(0), state)); }
};

TEST_F(GroupOfHosts, ACutLinkIsNoticedAndAMendedOneJoins) {
  work(100);
  for (const auto& rank : ranks) rank->tell("work 1000000");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const int64_t begin_us = clock.now_us();
  ASSERT_TRUE(set_link("down"));
  // On this side a rank of the other one is named, there the coordinator.
  const auto names_other_side = [](const std::string& line) {
    return line.find("rank 2 is gone: silent") != std::string::npos ||
           line.find("connection to rank 2 is lost") != std::string::npos ||
           line.find("connection to rank 3 is lost") != std::string::npos;
  };
  for (const size_t r : {0U, 1U}) {
    EXPECT_TRUE(ranks[r]->hear_if(names_other_side, kLongUs)) << ranks[r]->said();
    EXPECT_LE(clock.now_us() - begin_us, kTimeoutUs);
  }
  for (const size_t r : {2U, 3U}) {
    EXPECT_TRUE(ranks[r]->hear_of("the coordinator at 10.78.0.1", kLongUs)) << ranks[r]->said();
    EXPECT_LE(clock.now_us() - begin_us, kTimeoutUs);
  }
  std::this_thread::sleep_for(std::chrono::microseconds(2 * kTimeoutUs));
  EXPECT_FALSE(coordinator->status().standing);
  ASSERT_EQ(coordinator->status().missing.size(), 2U) << coordinator->status().text;
  ASSERT_TRUE(set_link("up"));
  wait_for_epoch();
  work(100);
}

TEST_F(GroupOfHosts, AHostThatDiesIsReplaced) {
  for (const auto& rank : ranks) rank->tell("work 1000000");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const int64_t begin_us = clock.now_us();
  for (const size_t r : {2U, 3U}) ranks[r]->kill(SIGKILL);
  for (const size_t r : {0U, 1U}) {
    EXPECT_TRUE(ranks[r]->hear_of("is gone: its connection was closed", kLongUs)) << ranks[r]->said();
    EXPECT_LE(clock.now_us() - begin_us, kTimeoutUs);
  }
  for (const int32_t r : {2, 3}) ranks[static_cast<size_t>(r)] = start_rank_there(r);
  wait_for_epoch();
  work(100);
}

}  // namespace
}  // namespace tandem::group
