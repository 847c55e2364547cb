#include "src/commands/shutdown.h"

#include <csignal>
#include <utility>

#include "src/base/log.h"

namespace tandem::commands {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kLook{20};     // at whether the last request has ended
constexpr std::chrono::milliseconds kLinger{200};  // for errors to leave; whoever reads slower is cut

}  // namespace

DrainedServer drain_frontend(std::function<api::Frontend*()> frontend) {
  return {[frontend] { return frontend() != nullptr; }, [frontend] { return frontend()->num_requests(); },
          [frontend](const Error& why) { frontend()->drain(why); }, [frontend](const Error& why) { frontend()->close(why); }};
}

Shutdown::Shutdown(boost::asio::io_context& io, const char* log_tag, double timeout_s, DrainedServer server,
                   std::function<void()> stop)
    : tag_(log_tag),
      timeout_(static_cast<int64_t>(timeout_s * 1e6)),
      server_(std::move(server)),
      stop_(std::move(stop)),
      signals_(io, SIGINT, SIGTERM),
      timer_(io) {
  wait_for_signal();
}

void Shutdown::wait_for_signal() {
  signals_.async_wait([this](const boost::system::error_code& error, int signal) {
    if (error) return;
    take_signal(signal);
    wait_for_signal();
  });
}

void Shutdown::take_signal(int signal) {
  const char* const name = signal == SIGINT ? "interrupted" : "terminated";
  if (++num_signals_ > 1) {
    log_info(tag_, "{} again: {} request(s) end now", name, server_.is_open() ? server_.num_requests() : 0);
    return finish();
  }
  if (!server_.is_open()) {
    log_info(tag_, "{}: shutting down", name);
    return stop_();
  }
  const double timeout_s = static_cast<double>(timeout_.count()) * 1e-6;
  log_info(tag_, "{}: draining, {} request(s) may go on for {} s (--shutdown-timeout)", name, server_.num_requests(),
           timeout_s);
  Error draining = make_error(ErrorKind::kUnavailable, "the server is shutting down; try another one");
  draining.code = "draining";
  server_.drain(draining);
  end_ = Clock::now() + timeout_;
  look();
}

void Shutdown::look() {
  if (is_finishing_) return;
  if (server_.num_requests() == 0 || Clock::now() >= end_) return finish();
  timer_.expires_after(kLook);
  timer_.async_wait([this](const boost::system::error_code& error) {
    if (!error) look();
  });
}

void Shutdown::finish() {
  if (std::exchange(is_finishing_, true)) return;
  const int64_t left = server_.is_open() ? server_.num_requests() : 0;
  if (left > 0) {
    log_warning(tag_, "{} request(s) are ended by the shutdown", left);
    Error cut = make_error(ErrorKind::kUnavailable,
                           "the server shut down before the answer was complete; ask another one");
    cut.code = "shutdown";
    server_.close(cut);
  }
  timer_.expires_after(left > 0 ? kLinger : kLook);
  timer_.async_wait([this](const boost::system::error_code& error) {
    if (!error) stop_();
  });
}

}  // namespace tandem::commands
