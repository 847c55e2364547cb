#include "src/cluster/launcher.h"

#include <signal.h>
#include <sys/wait.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <deque>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "src/api/http_client.h"
#include "src/cluster/process.h"
#include "src/cluster/restart_policy.h"

namespace tandem::cluster {
namespace {

namespace asio = boost::asio;
using std::chrono::milliseconds;
using SteadyTime = std::chrono::steady_clock::time_point;

constexpr milliseconds kPollInterval{100};  // of /health while a process loads
constexpr milliseconds kPollTimeout{1'000};
constexpr milliseconds kPatience{4'000};  // from the end of the shutdown time-out to SIGKILL
constexpr size_t kShownLogLines = 8;

enum class State { kStopped, kLoading, kReady };

struct Child {
  explicit Child(asio::io_context& io, const ProcessSpec& process) : spec(process), timer(io) {}
  const ProcessSpec& spec;
  asio::steady_timer timer;  // for the next poll, or the restart
  RestartPolicy restarts;
  State state = State::kStopped;
  pid_t pid = 0;
  bool was_ready = false;    // ever
  SteadyTime ready_since{};  // in its present life
  double progress = 0;
  int shown_tenth = -1;  // last progress line on a non-terminal
  api::CallId poll{};
};

class Launcher {
 public:
  Launcher(const ClusterPlan& plan, const LauncherOptions& options)
      : plan_(plan), options_(options), signals_(io_, SIGINT, SIGTERM, SIGCHLD), client_(io_, {}), kill_timer_(io_) {
    for (const ProcessSpec& process : plan_.processes) children_.emplace_back(io_, process);
  }

  int run() {
    wait_for_signal();
    for (Child& child : children_) {
      if (!start(child)) {
        stop_all(1);
        break;
      }
    }
    if (!stopping_) io_.run();
    while (num_alive() > 0) io_.run_one();
    return exit_code_;
  }

 private:
  bool start(Child& child) {
    const Result<pid_t> pid = spawn_process(options_.program, child.spec.arguments, log_path(child));
    if (!pid.ok()) {
      say("{}: {}", child.spec.name, pid.error().message);
      return false;
    }
    child.pid = *pid;
    child.state = State::kLoading;
    child.progress = 0;
    child.shown_tenth = -1;
    std::ofstream(fmt::format("{}/{}.pid", options_.run_dir, child.spec.name)) << *pid << "\n";
    say("{} started, pid {}", child.spec.name, *pid);
    poll_later(child);
    return true;
  }

  void poll_later(Child& child) {
    child.timer.expires_after(kPollInterval);
    child.timer.async_wait([this, &child](const boost::system::error_code& error) {
      if (!error && child.state == State::kLoading && !stopping_) poll(child);
    });
  }

  void poll(Child& child) {
    api::ClientRequest request;
    request.target = "/health";
    request.connect_timeout = request.idle_timeout = request.total_timeout = kPollTimeout;
    child.poll = client_.start(api::parse_http_url(child.spec.url()).value(), std::move(request),
                               {.on_done = [this, &child](Result<api::ClientResponse> response) {
                                 if (child.state != State::kLoading || stopping_) return;
                                 take_health(child, response);
                               }});
  }

  void take_health(Child& child, const Result<api::ClientResponse>& response) {
    if (response.ok() && response->is_success()) {
      child.state = State::kReady;
      child.was_ready = true;
      child.ready_since = std::chrono::steady_clock::now();
      say("{} is ready", child.spec.name);
      announce_if_all_ready();
      return;
    }
    if (response.ok()) {
      const nlohmann::json body = nlohmann::json::parse(response->body, nullptr, /*allow_exceptions=*/false);
      if (body.is_object() && body.contains("progress") && body["progress"].is_number()) {
        child.progress = body["progress"].get<double>();
      }
      show_progress(child);
    }
    poll_later(child);
  }

  void show_progress(Child& child) {
    if (!options_.is_terminal) {
      const int tenth = static_cast<int>(child.progress * 10);
      if (tenth > child.shown_tenth && child.progress > 0)
        say("{} loading {:.0f} %", child.spec.name, child.progress * 100);
      child.shown_tenth = std::max(child.shown_tenth, tenth);
      return;
    }
    std::string line = "loading";
    for (const Child& each : children_) {
      line += "  " + each.spec.name;
      line += each.state == State::kReady ? " ready"
              : each.progress > 0         ? fmt::format(" {:.0f} %", each.progress * 100)
                                          : " waits";
    }
    options_.print("\r\033[K" + line);
    line_is_open_ = true;
  }

  void announce_if_all_ready() {
    for (const Child& child : children_) {
      if (child.state != State::kReady) return;
    }
    if (announced_) return;
    announced_ = true;
    say("ready: {} serves {}", plan_.entrance().url(), plan_.model);
  }

  void wait_for_signal() {
    signals_.async_wait([this](const boost::system::error_code& error, int signal) {
      if (error) return;
      if (signal == SIGCHLD) {
        reap();
      } else if (!stopping_) {
        say("stopping ({})", signal == SIGINT ? "SIGINT" : "SIGTERM");
        stop_all(0);
      } else {
        kill_all(SIGKILL);  // asked twice
      }
      if (!stopping_ || num_alive() > 0) wait_for_signal();
    });
  }

  // SIGCHLD may stand for several children.
  void reap() {
    for (Child& child : children_) {
      int status = 0;
      if (child.pid == 0 || ::waitpid(child.pid, &status, WNOHANG) != child.pid) continue;
      ::kill(-child.pid, SIGKILL);  // whatever it left in its group
      child.pid = 0;
      take_death(child, status);
    }
    if (!stopping_) return;
    if (num_alive() == 0) return io_.stop();
    if (children_.back().pid == 0) stop_next();
  }

  void take_death(Child& child, int status) {
    const SteadyTime now = std::chrono::steady_clock::now();
    const bool was_ready_now = child.state == State::kReady;
    child.state = State::kStopped;
    client_.cancel(child.poll);
    std::error_code ignored;
    std::filesystem::remove(fmt::format("{}/{}.pid", options_.run_dir, child.spec.name), ignored);
    if (stopping_) return;
    if (!child.was_ready) {
      say("{} failed at start: {}; the end of {}:\n{}", child.spec.name, describe_exit(status), log_path(child),
          tail_of_file(log_path(child), kShownLogLines));
      return stop_all(1);
    }
    const auto ready_for = std::chrono::duration_cast<milliseconds>(now - child.ready_since);
    const std::optional<int64_t> delay = child.restarts.next_delay_ms(was_ready_now ? ready_for.count() : 0);
    if (!delay) {
      say("{} died: {}; given up after {} restarts, see {}", child.spec.name, describe_exit(status),
          RestartPolicy::kMaxFailures, log_path(child));
      return stop_all(1);
    }
    say("{} died: {}; restarting in {:.1f} s", child.spec.name, describe_exit(status),
        static_cast<double>(*delay) / 1000);
    announced_ = false;
    child.timer.expires_after(milliseconds(*delay));
    child.timer.async_wait([this, &child](const boost::system::error_code& error) {
      if (!error && !stopping_ && !start(child)) stop_all(1);
    });
  }

  void stop_all(int exit_code) {
    stopping_ = true;
    exit_code_ = exit_code;
    for (Child& child : children_) {
      child.timer.cancel();
      client_.cancel(child.poll);
    }
    if (num_alive() == 0) return io_.stop();
    stop_next();
  }

  // First the entrance, which needs the others for the requests that it still has; then they.
  void stop_next() {
    const Child& entrance = children_.back();  // as ClusterPlan::entrance
    if (entrance.pid != 0) {
      ::kill(-entrance.pid, SIGTERM);
    } else if (std::exchange(others_are_told_, true)) {
      return;
    } else {
      kill_all(SIGTERM);
    }
    kill_timer_.expires_after(milliseconds(static_cast<int64_t>(options_.shutdown_timeout_s * 1000)) + kPatience);
    kill_timer_.async_wait([this](const boost::system::error_code& error) {
      if (!error) kill_all(SIGKILL);
    });
  }

  void kill_all(int signal) {
    for (const Child& child : children_) {
      if (child.pid != 0) ::kill(-child.pid, signal);
    }
  }

  int num_alive() const {
    int count = 0;
    for (const Child& child : children_) count += child.pid != 0 ? 1 : 0;
    return count;
  }

  std::string log_path(const Child& child) const { return fmt::format("{}/{}.log", options_.run_dir, child.spec.name); }

  template <typename... Args>
  void say(fmt::format_string<Args...> format, Args&&... args) {
    if (std::exchange(line_is_open_, false)) options_.print("\r\033[K");
    options_.print(fmt::format(format, std::forward<Args>(args)...) + "\n");
  }

  const ClusterPlan& plan_;
  const LauncherOptions& options_;
  asio::io_context io_{1};
  asio::signal_set signals_;
  api::HttpClient client_;
  asio::steady_timer kill_timer_;
  std::deque<Child> children_;
  bool stopping_ = false;
  bool others_are_told_ = false;
  bool announced_ = false;
  bool line_is_open_ = false;  // a progress line without its end
  int exit_code_ = 0;
};

}  // namespace

int run_cluster(const ClusterPlan& plan, const LauncherOptions& options) {
  for (const ProcessSpec& process : plan.processes) {
    for (const PortUse& used : list_ports(process)) {
      const std::string use = fmt::format("{}'s {}", process.name, used.what);
      if (const Status free = check_port_free(process.host, used.port, use); !free.ok()) {
        options.print(free.error().message + "\n");
        return 1;
      }
    }
  }
  std::error_code error;
  std::filesystem::create_directories(options.run_dir, error);
  if (error) {
    options.print(fmt::format("{}: cannot be created: {}\n", options.run_dir, error.message()));
    return 1;
  }
  for (const ProcessSpec& process : plan.processes) {  // logs of this run only
    std::ofstream(fmt::format("{}/{}.log", options.run_dir, process.name), std::ios::trunc);
  }
  return Launcher(plan, options).run();
}

}  // namespace tandem::cluster
