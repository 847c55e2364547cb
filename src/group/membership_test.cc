// Groups of real processes over real sockets.
#include "src/group/membership.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <thread>

#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/comm/address.h"
#include "src/comm/meeting.h"
#include "src/group/coordinator.h"
#include "src/group/rank_process.h"

namespace tandem::group {
namespace {

using testing::HasSubstr;

constexpr int64_t kTimeoutUs = 1'000'000;
constexpr int64_t kLongUs = 20'000'000;  // for what has no bound of its own

class GroupOfProcesses : public testing::Test {
 protected:
  void SetUp() override { init_log(LogLevel::kError, ""); }

  void start_coordinator(int32_t size, int64_t rank_timeout_us = kTimeoutUs, int64_t port = 0) {
    options.size = size;
    options.rank_timeout_us = rank_timeout_us;
    coordinator = Coordinator::listen({.port = port, .shape = {size, 1}, .rank_timeout_us = rank_timeout_us}).value();
    options.port = coordinator->port();
  }
  std::unique_ptr<RankProcess> start_rank(int32_t rank) {
    RankProcessOptions own = options;
    own.rank = rank;
    return std::make_unique<RankProcess>(own);
  }
  void start_group(int32_t size, int64_t rank_timeout_us = kTimeoutUs) {
    start_coordinator(size, rank_timeout_us);
    for (int32_t r = 0; r < size; ++r) ranks.push_back(start_rank(r));
    wait_for_epoch();
  }
  // All ranks say "up" with the same epoch.
  std::string wait_for_epoch() {
    std::string epoch;
    for (const std::unique_ptr<RankProcess>& rank : ranks) {
      const std::optional<std::string> up = rank->hear("up ", kLongUs);
      EXPECT_TRUE(up.has_value()) << rank->said();
      EXPECT_TRUE(epoch.empty() || up.value_or("none") == epoch) << rank->said();
      epoch = up.value_or("none");
    }
    return epoch;
  }
  void work(int64_t rounds) {
    for (const std::unique_ptr<RankProcess>& rank : ranks) rank->tell(fmt::format("work {}", rounds));
    int64_t most = 0;
    for (const std::unique_ptr<RankProcess>& rank : ranks) {
      const std::optional<std::string> worked = rank->hear("worked ", kLongUs);
      ASSERT_TRUE(worked.has_value()) << rank->said();
      most = std::max<int64_t>(most, std::stoll(*worked));
    }
    EXPECT_GE(most, 1);
  }
  template <typename Condition>
  bool eventually(Condition&& condition) {
    const int64_t end_us = clock.now_us() + kLongUs;
    while (!condition()) {
      if (clock.now_us() > end_us) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return true;
  }

  SteadyClock clock;
  RankProcessOptions options;
  std::unique_ptr<Coordinator> coordinator;
  std::vector<std::unique_ptr<RankProcess>> ranks;
};

class GroupSizes : public GroupOfProcesses, public testing::WithParamInterface<int32_t> {};
INSTANTIATE_TEST_SUITE_P(Ranks, GroupSizes, testing::Values(1, 2, 8));

TEST_P(GroupSizes, FormsAndWorksInLockstep) {
  start_group(GetParam(), 5'000'000);
  work(200);
  const GroupStatus status = coordinator->status();
  EXPECT_TRUE(status.standing);
  EXPECT_EQ(status.formations, 1);
  ASSERT_EQ(std::ssize(status.members), GetParam());
  for (int32_t r = 0; r < GetParam(); ++r) {
    const MemberStatus& member = status.members[static_cast<size_t>(r)];
    EXPECT_EQ(member.rank, RankId(r));
    EXPECT_EQ(member.pid, ranks[static_cast<size_t>(r)]->pid());
    EXPECT_EQ(member.http_address, fmt::format("127.0.0.1:{}", 8000 + r));
  }
  EXPECT_TRUE(status.missing.empty());
}

TEST_F(GroupOfProcesses, OneBusyRankCallsTheOthers) {
  start_group(3, 5'000'000);
  ranks[1]->tell("work 50");
  for (const auto& rank : ranks) EXPECT_TRUE(rank->hear("worked ", kLongUs).has_value()) << rank->said();
}

TEST_F(GroupOfProcesses, TellsWhomItWaitsFor) {
  start_coordinator(4);
  ranks.push_back(start_rank(0));
  ranks.push_back(start_rank(1));
  ASSERT_TRUE(ranks[0]->hear("down unavailable waiting for ranks 2, 3", kLongUs).has_value()) << ranks[0]->said();
  const GroupStatus status = coordinator->status();
  EXPECT_FALSE(status.standing);
  EXPECT_EQ(status.text, "waiting for ranks 2, 3");
  ASSERT_EQ(status.missing.size(), 2U);
  EXPECT_EQ(status.missing[1].rank, RankId(3));
  EXPECT_GT(status.missing[1].missing_us, 0);
}

TEST_F(GroupOfProcesses, AKilledRankIsNamedAndReplaced) {
  start_group(4);
  for (const auto& rank : ranks) rank->tell("work 1000000");
  const int64_t begin_us = clock.now_us();
  ranks[2]->kill(SIGKILL);
  for (const size_t r : {0U, 1U, 3U}) {
    // From the call that failed, or from status() if it was between two.
    ASSERT_TRUE(ranks[r]->hear_of("rank 2 is gone: its connection was closed", kLongUs)) << ranks[r]->said();
    EXPECT_LE(clock.now_us() - begin_us, kTimeoutUs);
  }
  EXPECT_EQ(coordinator->status().text, "rank 2 is gone: its connection was closed; waiting for rank 2");
  ranks[2] = start_rank(2);
  EXPECT_EQ(wait_for_epoch(), "2");
  work(100);
}

TEST_F(GroupOfProcesses, AStoppedRankIsNamedAndFencedWhenItWakes) {
  start_group(4);
  for (const bool busy : {true, false}) {
    if (busy) {
      for (const auto& rank : ranks) rank->tell("work 1000000");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    const int64_t begin_us = clock.now_us();
    ranks[3]->signal(SIGSTOP);
    for (const size_t r : {0U, 1U, 2U}) {
      ASSERT_TRUE(ranks[r]->hear_of("rank 3 is gone: silent for", kLongUs)) << ranks[r]->said();
      EXPECT_LE(clock.now_us() - begin_us, kTimeoutUs);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(kTimeoutUs / 2));
    EXPECT_FALSE(coordinator->status().standing);
    ranks[3]->signal(SIGCONT);
    const std::string epoch = wait_for_epoch();
    // The woken rank heard that it was given up before it joined again.
    EXPECT_THAT(ranks[3]->said(), HasSubstr("rank 3 is gone: silent for"));
    EXPECT_EQ(epoch, busy ? "2" : "3");
    work(100);
  }
}

TEST_F(GroupOfProcesses, ARankWhoseEngineHangsIsNamed) {
  start_group(3, 300'000);
  ranks[1]->tell("hang");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  ranks[0]->tell("work 1");
  const std::optional<std::string> failed = ranks[0]->hear("failed ", kLongUs);
  ASSERT_TRUE(failed.has_value());
  EXPECT_THAT(*failed, HasSubstr("rank 1 has shown no sign of life for 0.3 s"));
  EXPECT_TRUE(eventually([&] {
    return coordinator->status().text.starts_with("rank 1 did not let go of the last epoch and make a window within 0.9 s");
  })) << coordinator->status().text;
  EXPECT_TRUE(eventually([&] { return coordinator->status().missing.size() == 1; }));
  ranks[1]->tell("go");
  wait_for_epoch();
  work(10);
}

TEST_F(GroupOfProcesses, DifferentFactsAreRefusedWithBothValues) {
  start_coordinator(2);
  options.facts = {"model=3f9c", "program=0.1.0"};
  ranks.push_back(start_rank(0));
  ASSERT_TRUE(eventually([&] { return coordinator->status().members.size() == 1; }));
  options.facts = {"model=77aa", "program=0.1.0"};
  ranks.push_back(start_rank(1));
  const std::optional<std::string> down = ranks[1]->hear("down invalid_argument ", kLongUs);
  ASSERT_TRUE(down.has_value()) << ranks[1]->said();
  EXPECT_THAT(*down, HasSubstr("rank 1 has \"77aa\" as \"model\", rank 0 has \"3f9c\""));
  ASSERT_TRUE(eventually([&] { return !coordinator->status().refusals.empty(); }));
  EXPECT_EQ(coordinator->status().refusals[0].rank, 1);
  EXPECT_THAT(coordinator->status().refusals[0].message, HasSubstr("77aa"));
  // It is the first one that was wrong: restarted, both fit.
  options.facts = {"model=77aa", "program=0.1.0"};
  ranks[0]->kill(SIGKILL);
  ranks[0] = start_rank(0);
  wait_for_epoch();
}

TEST_F(GroupOfProcesses, AnotherSizeAndATakenRankAreRefused) {
  start_coordinator(2);
  ranks.push_back(start_rank(0));
  ASSERT_TRUE(eventually([&] { return coordinator->status().members.size() == 1; }));
  const std::unique_ptr<RankProcess> twin = start_rank(0);
  const std::optional<std::string> taken = twin->hear("down unavailable the coordinator", kLongUs);
  ASSERT_TRUE(taken.has_value());
  EXPECT_THAT(*taken, HasSubstr(fmt::format("rank 0 is taken by process {}", ranks[0]->pid())));
  options.size = 3;
  const std::unique_ptr<RankProcess> other = start_rank(1);
  const std::optional<std::string> size = other->hear("down invalid_argument ", kLongUs);
  ASSERT_TRUE(size.has_value());
  EXPECT_THAT(*size, HasSubstr("3 x 1"));
  EXPECT_THAT(*size, HasSubstr("2 x 1"));
  // When the holder goes, the one that waits takes its place.
  options.size = 2;
  ranks[0]->kill(SIGKILL);
  ranks.push_back(start_rank(1));
  EXPECT_TRUE(twin->hear("up ", kLongUs).has_value()) << twin->said();
}

TEST_F(GroupOfProcesses, FormsAgainAfterTheCoordinatorRestarts) {
  // Not of the ephemeral range: a rank that looks for the coordinator could get the port itself.
  start_coordinator(3, kTimeoutUs, 20'000 + ::getpid() % 10'000);
  for (int32_t r = 0; r < 3; ++r) ranks.push_back(start_rank(r));
  wait_for_epoch();
  for (const auto& rank : ranks) rank->tell("work 1000000");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const int64_t begin_us = clock.now_us();
  coordinator.reset();
  for (const auto& rank : ranks) {
    ASSERT_TRUE(rank->hear_of("the coordinator at 127.0.0.1", kLongUs)) << rank->said();
    EXPECT_LE(clock.now_us() - begin_us, kTimeoutUs);
  }
  start_coordinator(3, kTimeoutUs, options.port);
  EXPECT_EQ(wait_for_epoch(), "2") << "epochs go on, though the coordinator is a new one";
  work(100);
}

TEST_F(GroupOfProcesses, GarbageOnThePortHarmsNobody) {
  start_group(2);
  const std::string wrong_type = "{\"type\":\"beat\",\"text\":\"\"}";
  const std::string wrong_fields = "{\"type\":\"join\",\"protocol\":2}";
  const auto framed = [](const std::string& text) {
    return std::string("\0\0\0", 3) + static_cast<char>(text.size()) + text;
  };
  const std::string cases[] = {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", std::string(100'000, '\xff'), std::string(4, '\0'),
                               framed("{]"), framed("[[[[[[[[["), framed(wrong_type), framed(wrong_fields)};
  for (const std::string& bytes : cases) {
    const int socket = comm::start_connect(*comm::parse_address("127.0.0.1", options.port)).value();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    static_cast<void>(::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL));
    // Closed by the coordinator, before the time-out of those who say nothing.
    const int64_t begin_us = clock.now_us();
    char ignored[512];
    pollfd event{socket, POLLIN, 0};
    while (::poll(&event, 1, 5000) > 0 && ::recv(socket, ignored, sizeof ignored, 0) > 0) {
    }
    EXPECT_LT(clock.now_us() - begin_us, kTimeoutUs / 2) << bytes.substr(0, 40);
    ::close(socket);
  }
  EXPECT_TRUE(coordinator->status().standing);
  EXPECT_EQ(coordinator->status().epoch, Epoch(1));
  work(100);
}

TEST_F(GroupOfProcesses, AGroupOfFourThatIsIdleUsesLessThanOnePercent) {
  start_group(4, 10'000'000);
  work(10);
  int64_t before = 0;
  for (const auto& rank : ranks) before += rank->cpu_ticks();
  constexpr int64_t kSeconds = 4;
  std::this_thread::sleep_for(std::chrono::seconds(kSeconds));
  int64_t after = 0;
  for (const auto& rank : ranks) after += rank->cpu_ticks();
  const double share = static_cast<double>(after - before) / static_cast<double>(::sysconf(_SC_CLK_TCK) * kSeconds);
  std::printf("idle group of 4: %.3f %% of one core\n", share * 100);
  EXPECT_LT(share, 0.01);
}

}  // namespace
}  // namespace tandem::group
