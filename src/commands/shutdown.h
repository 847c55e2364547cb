// How a server ends: on SIGINT or SIGTERM it takes no new requests, lets those it has run on for a while, and stops.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <functional>

#include "src/api/frontend.h"

namespace tandem::commands {

// The front ends of a process. Closed, it serves nothing and there is nothing to wait for.
struct DrainedServer {
  std::function<bool()> is_open;
  std::function<int64_t()> num_requests;
  std::function<void(const Error& why)> drain;
  std::function<void(const Error& why)> close;
};
// Of one front end; `frontend` gives null while nothing is served.
DrainedServer drain_frontend(std::function<api::Frontend*()> frontend);

// First signal: new requests get 503 with Retry-After, /health says "draining" (503), running ones go on for at most
// `timeout_s`; then they end with an error that says so. Second signal: they end at once. On the thread of `io`.
class Shutdown {
 public:
  // `stop` is called once, when all answers have been given and have had a moment to leave.
  Shutdown(boost::asio::io_context& io, const char* log_tag, double timeout_s, DrainedServer server,
           std::function<void()> stop);

 private:
  void wait_for_signal();
  void take_signal(int signal);
  void look();
  // Ends what still runs, and then this.
  void finish();

  const char* const tag_;
  const std::chrono::microseconds timeout_;
  const DrainedServer server_;
  const std::function<void()> stop_;
  boost::asio::signal_set signals_;
  boost::asio::steady_timer timer_;
  std::chrono::steady_clock::time_point end_{};
  int num_signals_ = 0;
  bool is_finishing_ = false;
};

}  // namespace tandem::commands
