#include "src/cluster/rank_processes.h"

#include <signal.h>
#include <sys/wait.h>

#include <cerrno>
#include <optional>

#include "src/base/log.h"
#include "src/cluster/process.h"

namespace tandem::cluster {

using std::chrono::milliseconds;

namespace {
constexpr const char* kTag = "ranks";
constexpr milliseconds kPatience{4'000};  // from SIGTERM to SIGKILL
constexpr milliseconds kStartTime{30'000};  // who has lived so long did not fail at start, whatever ended it
}  // namespace

RankProcesses::RankProcesses(boost::asio::io_context& io, std::string program, std::vector<RankProcess> processes,
                             std::function<void(const Error&)> on_fatal)
    : program_(std::move(program)), on_fatal_(std::move(on_fatal)), deaths_(io, SIGCHLD), kill_timer_(io) {
  for (RankProcess& process : processes) children_.emplace_back(io, std::move(process));
}

RankProcesses::~RankProcesses() {
  signal_all(SIGKILL);
  for (const Child& child : children_) {
    // Interrupted by the SIGCHLD of another child, it has not waited yet.
    while (child.pid != 0 && ::waitpid(child.pid, nullptr, 0) < 0 && errno == EINTR) continue;
  }
}

Status RankProcesses::start() {
  wait_for_deaths();
  for (Child& child : children_) TANDEM_TRY(start(child));
  return {};
}

Status RankProcesses::start(Child& child) {
  TANDEM_ASSIGN(child.pid, spawn_process(program_, child.spec.arguments, kOwnErrors));
  child.is_ready = false;
  child.started = std::chrono::steady_clock::now();
  log_info(kTag, "rank {} started, pid {}", child.spec.rank, child.pid);
  return {};
}

void RankProcesses::mark_ready(int32_t rank) {
  for (Child& child : children_) {
    if (child.spec.rank != rank || child.is_ready || child.pid == 0) continue;
    child.was_ready = child.is_ready = true;
    child.ready_since = std::chrono::steady_clock::now();
  }
}

void RankProcesses::wait_for_deaths() {
  deaths_.async_wait([this](const boost::system::error_code& error, int) {
    if (error) return;
    reap();
    if (!is_stopping_ || num_alive() > 0) wait_for_deaths();
  });
}

// One SIGCHLD may stand for several children.
void RankProcesses::reap() {
  for (Child& child : children_) {
    int status = 0;
    if (child.pid == 0 || ::waitpid(child.pid, &status, WNOHANG) != child.pid) continue;
    ::kill(-child.pid, SIGKILL);  // whatever it left in its group
    child.pid = 0;
    if (!is_stopping_) take_death(child, status);
  }
  if (is_stopping_ && num_alive() == 0 && on_stopped_) std::exchange(on_stopped_, nullptr)();
}

void RankProcesses::take_death(Child& child, int status) {
  const int32_t rank = child.spec.rank;
  const auto now = std::chrono::steady_clock::now();
  if (!child.was_ready && WIFEXITED(status) && now - child.started < kStartTime) {
    if (on_fatal_) {
      std::exchange(on_fatal_, nullptr)(make_error(
          ErrorKind::kUnavailable, "rank {} failed at start ({}); its lines above say why", rank, describe_exit(status)));
    }
    return;
  }
  const auto lived = now - (child.is_ready ? child.ready_since : child.started);
  const int64_t ready_ms = std::chrono::duration_cast<milliseconds>(lived).count();
  const std::optional<int64_t> delay_ms = child.restarts.next_delay_ms(ready_ms);
  if (!delay_ms) {
    if (on_fatal_) {
      std::exchange(on_fatal_, nullptr)(make_error(ErrorKind::kUnavailable, "rank {} died ({}) and was restarted {} times",
                                                   rank, describe_exit(status), RestartPolicy::kMaxFailures));
    }
    return;
  }
  log_warning(kTag, "rank {} died: {}; it is started again in {:.1f} s", rank, describe_exit(status),
              static_cast<double>(*delay_ms) / 1000);
  ++num_restarts_;
  child.timer.expires_after(milliseconds(*delay_ms));
  child.timer.async_wait([this, &child](const boost::system::error_code& error) {
    if (error || is_stopping_) return;
    if (Status started = start(child); !started.ok() && on_fatal_) std::exchange(on_fatal_, nullptr)(started.error());
  });
}

void RankProcesses::stop(std::function<void()> done) {
  is_stopping_ = true;
  on_stopped_ = std::move(done);
  for (Child& child : children_) child.timer.cancel();
  signal_all(SIGTERM);
  if (num_alive() == 0) return std::exchange(on_stopped_, nullptr)();
  kill_timer_.expires_after(kPatience);
  kill_timer_.async_wait([this](const boost::system::error_code& error) {
    if (!error) signal_all(SIGKILL);
  });
}

// A stopped process (SIGSTOP) takes SIGTERM only when it is continued.
void RankProcesses::signal_all(int signal) {
  for (const Child& child : children_) {
    if (child.pid != 0) ::kill(-child.pid, signal);
  }
}

int64_t RankProcesses::num_alive() const {
  int64_t count = 0;
  for (const Child& child : children_) count += child.pid != 0 ? 1 : 0;
  return count;
}

}  // namespace tandem::cluster
