#include "src/cluster/rank_processes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <optional>

namespace tandem::cluster {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

// Ranks are shells here; each writes its pid into a file of its own folder and does what the test says.
class RankProcessesTest : public testing::Test {
 protected:
  RankProcessesTest() {
    folder_ = testing::TempDir() + "/ranks-" + std::to_string(::getpid()) + "-" +
              testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::create_directories(folder_);
  }
  ~RankProcessesTest() override { std::filesystem::remove_all(folder_); }

  void start(const std::vector<std::string>& scripts) {
    std::vector<RankProcess> processes;
    for (size_t i = 0; i < scripts.size(); ++i) {
      const std::string script = fmt::format("echo $$ >> {}/{}; {}", folder_, i, scripts[i]);
      processes.push_back({static_cast<int32_t>(i), {"-c", script}});
    }
    ranks_.emplace(io_, "/bin/sh", std::move(processes), [this](const Error& why) { fatal_ = why; });
    ASSERT_TRUE(ranks_->start().ok());
  }
  std::vector<int> pids(int rank) const {
    std::ifstream file(fmt::format("{}/{}", folder_, rank));
    std::vector<int> found;
    for (int pid = 0; file >> pid;) found.push_back(pid);
    return found;
  }
  // Runs the loop until `condition` or 5 s.
  template <typename Condition>
  bool run_until(Condition condition) {
    for (int i = 0; i < 500; ++i) {
      if (condition()) return true;
      io_.run_for(milliseconds(10));
      io_.restart();
    }
    return false;
  }
  static bool is_alive(int pid) { return ::kill(pid, 0) == 0; }

  std::string folder_;
  boost::asio::io_context io_{1};
  std::optional<Error> fatal_;
  std::optional<RankProcesses> ranks_;
};

TEST_F(RankProcessesTest, StartsAgainWhoWasReady) {
  start({"exec sleep 60", "exec sleep 60"});
  ASSERT_TRUE(run_until([&] { return pids(0).size() == 1 && pids(1).size() == 1; }));
  ranks_->mark_ready(1);
  ::kill(pids(1)[0], SIGTERM);
  ASSERT_TRUE(run_until([&] { return pids(1).size() == 2; }));
  EXPECT_EQ(pids(0).size(), 1U);
  EXPECT_EQ(ranks_->num_restarts(), 1);
  EXPECT_FALSE(fatal_.has_value());
}

TEST_F(RankProcessesTest, StartsAgainWhoWasKilledThoughNobodySaidThatItIsReady) {
  start({"exec sleep 60"});
  ASSERT_TRUE(run_until([&] { return pids(0).size() == 1; }));
  ::kill(pids(0)[0], SIGKILL);
  ASSERT_TRUE(run_until([&] { return pids(0).size() == 2; }));
  EXPECT_FALSE(fatal_.has_value());
}

TEST_F(RankProcessesTest, GivesUpWhenOneEndsByItselfAtStart) {
  start({"exec sleep 60", "exit 3"});
  ASSERT_TRUE(run_until([&] { return fatal_.has_value(); }));
  EXPECT_THAT(fatal_->message, HasSubstr("rank 1 failed at start (exit code 3)"));
}

TEST_F(RankProcessesTest, StopsAllAndStartsNoneAgain) {
  start({"exec sleep 60", "trap '' TERM; sleep 60 & wait; sleep 60"});
  ASSERT_TRUE(run_until([&] { return pids(0).size() == 1 && pids(1).size() == 1; }));
  ranks_->mark_ready(0);
  bool stopped = false;
  ranks_->stop([&] { stopped = true; });
  ASSERT_TRUE(run_until([&] { return !is_alive(pids(0)[0]); }));
  EXPECT_FALSE(stopped) << "one does not hear SIGTERM and is still there";
  ASSERT_TRUE(run_until([&] { return stopped; }));
  EXPECT_EQ(pids(0).size(), 1U);
  EXPECT_EQ(pids(1).size(), 1U);
}

TEST_F(RankProcessesTest, LeavesNobodyBehind) {
  start({"exec sleep 60", "exec sleep 60"});
  ASSERT_TRUE(run_until([&] { return pids(0).size() == 1 && pids(1).size() == 1; }));
  const int first = pids(0)[0];
  const int second = pids(1)[0];
  ranks_.reset();
  EXPECT_FALSE(is_alive(first));
  EXPECT_FALSE(is_alive(second));
}

}  // namespace
}  // namespace tandem::cluster
