// The rank processes of one node: started, restarted when they die, and stopped together. If this process is killed, the
// kernel kills them.
#pragma once

#include <sys/types.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/cluster/restart_policy.h"

namespace tandem::cluster {

struct RankProcess {
  int32_t rank = 0;
  std::vector<std::string> arguments;  // of the tandem program
};

class RankProcesses {
 public:
  // One that ends by itself soon after its first start and before it was ready, or one that dies too often, is a fault for
  // which all have to end: `on_fatal` is told, once. Those that were killed are started again.
  // Their output goes where this process's errors go.
  RankProcesses(boost::asio::io_context& io, std::string program, std::vector<RankProcess> processes,
                std::function<void(const Error&)> on_fatal);
  ~RankProcesses();  // kills whoever is left

  // From the main thread: children die with the thread that started them.
  Status start();
  // The rank works: a later death is followed by a restart. A node that cannot know need not say so.
  void mark_ready(int32_t rank);
  // Asks all to end, kills those that do not, and calls `done` when none is left. No restarts any more.
  void stop(std::function<void()> done);

  int64_t num_restarts() const { return num_restarts_; }

 private:
  struct Child {
    Child(boost::asio::io_context& io, RankProcess process) : spec(std::move(process)), timer(io) {}
    RankProcess spec;
    boost::asio::steady_timer timer;  // for the restart
    RestartPolicy restarts;
    pid_t pid = 0;
    std::chrono::steady_clock::time_point started{};
    bool was_ready = false;  // ever
    bool is_ready = false;   // in its present life
    std::chrono::steady_clock::time_point ready_since{};
  };

  Status start(Child& child);
  void wait_for_deaths();
  void reap();
  void take_death(Child& child, int status);
  void signal_all(int signal);
  int64_t num_alive() const;

  const std::string program_;
  std::deque<Child> children_;
  std::function<void(const Error&)> on_fatal_;
  boost::asio::signal_set deaths_;
  boost::asio::steady_timer kill_timer_;
  std::function<void()> on_stopped_;
  bool is_stopping_ = false;
  int64_t num_restarts_ = 0;
};

}  // namespace tandem::cluster
