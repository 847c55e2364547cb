// The launcher with real processes: each test runs it in a child of its own and looks at what it prints and leaves.
#include "src/cluster/launcher.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "src/cluster/process.h"

namespace tandem::cluster {
namespace {

using std::chrono::milliseconds;

bool eventually(const std::function<bool()>& condition, milliseconds limit = milliseconds(10'000)) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(milliseconds(5));
  }
  return true;
}

// A port that nobody listens on. The kernel gives each a turn, so two calls differ.
int64_t free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ::bind(fd, reinterpret_cast<sockaddr*>(&address), size);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  ::close(fd);
  return ntohs(address.sin_port);
}

bool is_alive(pid_t pid) {
  std::ifstream stat(fmt::format("/proc/{}/stat", pid));
  std::string line;
  if (!std::getline(stat, line)) return false;
  return line.find(") Z") == std::string::npos;
}

class LauncherTest : public testing::Test {
 protected:
  LauncherTest() {
    run_dir = fmt::format("{}/launcher-{}-{}", testing::TempDir(), getpid(), free_port());
    std::filesystem::create_directories(run_dir);
  }
  ~LauncherTest() override {
    if (launcher > 0) {
      ::kill(launcher, SIGKILL);
      ::waitpid(launcher, nullptr, 0);
    }
    std::filesystem::remove_all(run_dir);
  }

  ProcessSpec process(const std::string& name, const std::string& behaviour) {
    ProcessSpec spec;
    spec.name = name;
    spec.role = "both";
    spec.host = "127.0.0.1";
    spec.port = free_port();
    spec.arguments = {"serve", behaviour, "--port", std::to_string(spec.port)};
    return spec;
  }

  void launch(std::vector<ProcessSpec> processes) {
    plan.model = "fake";
    plan.processes = std::move(processes);
    launcher = ::fork();
    if (launcher != 0) return;
    std::ofstream out(run_dir + "/out");
    LauncherOptions options;
    options.program = TANDEM_FAKE_WORKER;
    options.run_dir = run_dir;
    options.print = [&out](const std::string& text) { out << text << std::flush; };
    ::_exit(run_cluster(plan, options));
  }

  std::string output() {
    std::ifstream file(run_dir + "/out");
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
  }
  bool printed(const std::string& text) {
    return eventually([&] { return output().find(text) != std::string::npos; });
  }
  pid_t pid_of(const std::string& name) {
    pid_t pid = 0;
    std::ifstream(fmt::format("{}/{}.pid", run_dir, name)) >> pid;
    return pid;
  }
  // Waits for the launcher's end and returns its exit code, -1 after `limit`.
  int wait_for_end(milliseconds limit = milliseconds(5'000)) {
    int status = 0;
    if (!eventually([&] { return ::waitpid(launcher, &status, WNOHANG) == launcher; }, limit)) return -1;
    launcher = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  std::string run_dir;
  ClusterPlan plan;
  pid_t launcher = 0;
};

TEST_F(LauncherTest, StartsShowsProgressAndStopsAll) {
  launch({process("a", "slow"), process("b", "ok")});
  ASSERT_TRUE(printed("ready: http://")) << output();
  EXPECT_NE(output().find("a loading"), std::string::npos) << output();
  EXPECT_NE(output().find(plan.processes[1].url() + " serves fake"), std::string::npos);
  const pid_t a = pid_of("a"), b = pid_of("b");
  EXPECT_TRUE(is_alive(a) && is_alive(b));
  ::kill(launcher, SIGINT);
  EXPECT_EQ(wait_for_end(), 0);
  EXPECT_FALSE(is_alive(a) || is_alive(b));
  EXPECT_FALSE(std::filesystem::exists(run_dir + "/a.pid"));
}

TEST_F(LauncherTest, RestartsAProcessThatDied) {
  launch({process("a", "ok"), process("b", "ok")});
  ASSERT_TRUE(printed("ready: http://"));
  const pid_t first = pid_of("a");
  ::kill(first, SIGKILL);
  ASSERT_TRUE(printed("a died: signal 9 (Killed); restarting in 0.2 s")) << output();
  EXPECT_TRUE(eventually([&] { return output().find("ready: ") != output().rfind("ready: "); })) << output();
  const pid_t second = pid_of("a");
  EXPECT_NE(second, first);
  EXPECT_TRUE(is_alive(second));
  ::kill(second, SIGTERM);  // an orderly end is as unexpected
  EXPECT_TRUE(printed("a died: exit code 0; restarting in 0.4 s")) << output();
  ::kill(launcher, SIGTERM);
  EXPECT_EQ(wait_for_end(), 0);
}

TEST_F(LauncherTest, EndsWhenAProcessFailsAtStart) {
  launch({process("a", "ok"), process("b", "broken")});
  EXPECT_EQ(wait_for_end(), 1);
  EXPECT_NE(output().find("b failed at start: exit code 3"), std::string::npos) << output();
  EXPECT_NE(output().find("config.json: no such file"), std::string::npos) << output();
}

TEST_F(LauncherTest, RefusesATakenPortBeforeItStartsAnything) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ASSERT_EQ(::bind(fd, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(::listen(fd, 1), 0);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  ProcessSpec taken = process("b", "ok");
  taken.kv_port = ntohs(address.sin_port);
  launch({process("a", "ok"), taken});
  EXPECT_EQ(wait_for_end(), 1);
  EXPECT_EQ(output(), fmt::format("port {} (b's kv_port) on 127.0.0.1 cannot be used: Address already in use; stop its "
                                  "owner or choose another\n",
                                  taken.kv_port));
  ::close(fd);
}

TEST_F(LauncherTest, KillsWhatDoesNotListenWithinFiveSeconds) {
  launch({process("a", "deaf")});
  ASSERT_TRUE(printed("ready: http://"));
  const pid_t a = pid_of("a");
  const auto begin = std::chrono::steady_clock::now();
  ::kill(launcher, SIGTERM);
  EXPECT_EQ(wait_for_end(milliseconds(6'000)), 0);
  const auto took = std::chrono::steady_clock::now() - begin;
  EXPECT_GE(took, milliseconds(3'900));
  EXPECT_LE(took, milliseconds(5'000));
  EXPECT_FALSE(is_alive(a));
}

TEST_F(LauncherTest, AKilledLauncherLeavesNoOrphan) {
  launch({process("a", "ok"), process("b", "deaf")});
  ASSERT_TRUE(printed("ready: http://"));
  const pid_t a = pid_of("a"), b = pid_of("b");
  ::kill(launcher, SIGKILL);
  EXPECT_EQ(wait_for_end(), 128 + SIGKILL);
  EXPECT_TRUE(eventually([&] { return !is_alive(a) && !is_alive(b); }, milliseconds(1'000)));
}

}  // namespace
}  // namespace tandem::cluster
