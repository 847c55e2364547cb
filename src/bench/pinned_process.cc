#include "src/bench/pinned_process.h"

#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <ctime>
#include <fstream>
#include <numeric>
#include <thread>
#include <utility>

#include "src/base/check.h"
#include "src/cluster/process.h"

namespace tandem::bench {
namespace {

constexpr std::chrono::milliseconds kStopTime{5'000};
constexpr std::chrono::milliseconds kStopCheck{10};

}  // namespace

std::vector<int> usable_cpus() {
  cpu_set_t set;
  CHECK_EQ(::sched_getaffinity(0, sizeof set, &set), 0);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(static_cast<size_t>(cpu), &set)) cpus.push_back(cpu);
  }
  return cpus;
}

void pin_this_thread(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<size_t>(cpu), &set);
  CHECK_EQ(::sched_setaffinity(0, sizeof set, &set), 0);
}

Result<PinnedProcess> PinnedProcess::start(const std::string& program, const std::vector<std::string>& arguments,
                                           const std::string& log_path, int cpu) {
  // The child inherits the affinity of the thread that starts it.
  cpu_set_t before;
  CHECK_EQ(::sched_getaffinity(0, sizeof before, &before), 0);
  pin_this_thread(cpu);
  const Result<pid_t> pid = cluster::spawn_process(program, arguments, log_path);
  CHECK_EQ(::sched_setaffinity(0, sizeof before, &before), 0);
  if (!pid.ok()) return pid.error();
  return PinnedProcess(*pid);
}

PinnedProcess::PinnedProcess(PinnedProcess&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}

PinnedProcess::~PinnedProcess() {
  if (pid_ < 0) return;
  ::kill(pid_, SIGTERM);
  const auto until = std::chrono::steady_clock::now() + kStopTime;
  while (is_running() && std::chrono::steady_clock::now() < until) std::this_thread::sleep_for(kStopCheck);
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

bool PinnedProcess::is_running() {
  if (pid_ >= 0 && ::waitpid(pid_, nullptr, WNOHANG) == pid_) pid_ = -1;
  return pid_ >= 0;
}

double PinnedProcess::cpu_seconds() const {
  clockid_t clock{};
  timespec time{};
  if (pid_ < 0 || ::clock_getcpuclockid(pid_, &clock) != 0 || ::clock_gettime(clock, &time) != 0) return 0;
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

int64_t PinnedProcess::resident_bytes() const {
  std::ifstream file(fmt::format("/proc/{}/statm", pid_));
  int64_t size_pages = 0, resident_pages = 0;
  file >> size_pages >> resident_pages;
  return resident_pages * ::sysconf(_SC_PAGESIZE);
}

double slope_of(const std::vector<double>& xs, const std::vector<double>& ys) {
  CHECK_EQ(xs.size(), ys.size());
  if (xs.empty()) return 0;
  const double count = static_cast<double>(xs.size());
  const double mean_x = std::accumulate(xs.begin(), xs.end(), 0.0) / count;
  const double mean_y = std::accumulate(ys.begin(), ys.end(), 0.0) / count;
  double covariance = 0, variance = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    covariance += (xs[i] - mean_x) * (ys[i] - mean_y);
    variance += (xs[i] - mean_x) * (xs[i] - mean_x);
  }
  return variance == 0 ? 0 : covariance / variance;
}

}  // namespace tandem::bench
