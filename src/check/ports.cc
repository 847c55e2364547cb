#include "src/check/ports.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "src/base/clock.h"
#include "src/comm/address.h"

namespace tandem::check {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kLookUpTime{2'000};
constexpr int kBacklog = 128;
constexpr size_t kMaxGuests = 4096;  // connections that one set of listeners takes

struct LookUp {
  std::mutex mutex;
  std::condition_variable changed;
  std::optional<Result<comm::SocketAddress>> result;
};

Result<comm::SocketAddress> look_up(const std::string& host, milliseconds timeout) {
  if (const std::optional<comm::SocketAddress> address = comm::parse_address(host, 1)) return *address;
  // The resolver cannot be interrupted: it may go on beside us.
  const std::shared_ptr<LookUp> state = std::make_shared<LookUp>();
  std::thread([state, host] {
    Result<comm::SocketAddress> result = comm::look_up_address(host, 1);
    const std::lock_guard<std::mutex> lock(state->mutex);
    state->result = std::move(result);
    state->changed.notify_all();
  }).detach();
  std::unique_lock<std::mutex> lock(state->mutex);
  if (!state->changed.wait_for(lock, timeout, [&] { return state->result.has_value(); })) {
    return make_error(ErrorKind::kDeadlineExceeded, "host '{}': the resolver did not answer within {} ms", host,
                      timeout.count());
  }
  return *state->result;
}

std::string host_text(const comm::SocketAddress& address) {
  const std::string text = address.to_string();
  return text.substr(0, text.rfind(':'));
}

// Every name once.
std::map<std::string, Result<comm::SocketAddress>> look_up_all(const std::vector<HostPort>& places) {
  std::map<std::string, Result<comm::SocketAddress>> found;
  std::mutex mutex;
  std::vector<std::thread> threads;
  std::set<std::string> hosts;
  for (const HostPort& place : places) {
    if (!hosts.insert(place.host).second) continue;
    threads.emplace_back([&, host = place.host] {
      Result<comm::SocketAddress> address = look_up(host, kLookUpTime);
      const std::lock_guard<std::mutex> lock(mutex);
      found.emplace(host, std::move(address));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return found;
}

Result<comm::SocketAddress> with_port(const std::string& host, int64_t port) {
  const std::optional<comm::SocketAddress> address = comm::parse_address(host, port);
  if (!address) return make_error(ErrorKind::kInternal, "{} is not an address", host);
  return *address;
}

int make_socket(const comm::SocketAddress& address) {
  return ::socket(address.get()->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
}

// The bracketless form that parse_address takes.
std::string numeric(const comm::SocketAddress& address) {
  const std::string text = host_text(address);
  return text.front() == '[' ? text.substr(1, text.size() - 2) : text;
}

ListenOutcome listen_at(const comm::SocketAddress& resolved, int64_t port, int& fd) {
  ListenOutcome outcome;
  outcome.address = numeric(resolved);
  const Result<comm::SocketAddress> address = with_port(outcome.address, port);
  fd = address.ok() ? make_socket(*address) : -1;
  if (fd < 0) {
    outcome.text = address.ok() ? std::strerror(errno) : address.error().message;
    return outcome;
  }
  const int on = 1;
  ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (::bind(fd, address->get(), address->length) != 0 || ::listen(fd, kBacklog) != 0) {
    outcome.state = errno == EADDRINUSE      ? PortState::kTaken
                    : errno == EADDRNOTAVAIL ? PortState::kNotHere
                    : errno == EACCES        ? PortState::kDenied
                                             : PortState::kFailed;
    outcome.text = std::strerror(errno);
    ::close(fd);
    fd = -1;
    return outcome;
  }
  comm::SocketAddress own;
  own.length = sizeof own.storage;
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&own.storage), &own.length);
  outcome.state = PortState::kFree;
  outcome.port = own.port();
  return outcome;
}

}  // namespace

Result<std::string> resolve_host(const std::string& host, milliseconds timeout) {
  TANDEM_ASSIGN(const comm::SocketAddress address, look_up(host, timeout));
  return numeric(address);
}

// One thread that accepts and greets. Guests are kept open: they close first, so that nothing of the port stays behind.
struct Listeners::Greeter {
  std::string token;
  std::vector<int> listeners;
  std::vector<int> guests;
  int stop_fd = -1;
  std::thread thread;

  ~Greeter() {
    ::eventfd_write(stop_fd, 1);
    if (thread.joinable()) thread.join();
    for (const int fd : listeners) ::close(fd);
    for (const int fd : guests) ::close(fd);
    ::close(stop_fd);
  }

  void greet() {
    std::vector<pollfd> polled;
    for (const int fd : listeners) polled.push_back({fd, POLLIN, 0});
    polled.push_back({stop_fd, POLLIN, 0});
    while (guests.size() < kMaxGuests && ::poll(polled.data(), polled.size(), -1) > 0) {
      if (polled.back().revents != 0) return;
      for (const pollfd& ready : polled) {
        if (ready.revents == 0) continue;
        const int guest = ::accept4(ready.fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (guest < 0 && (errno == EAGAIN || errno == ECONNABORTED || errno == EINTR)) continue;
        if (guest < 0) return;  // no descriptor left: who connects then hears nothing, instead of us trying for ever
        [[maybe_unused]] const ssize_t sent = ::send(guest, token.data(), token.size(), MSG_NOSIGNAL);
        guests.push_back(guest);
      }
    }
  }
};

Listeners::Listeners(const std::vector<HostPort>& places, std::string token) : greeter_(std::make_unique<Greeter>()) {
  CHECK_LE(std::ssize(places), kMaxPorts);
  CHECK_LE(token.size(), kMaxTokenBytes);
  greeter_->token = std::move(token);
  greeter_->stop_fd = ::eventfd(0, EFD_CLOEXEC);
  CHECK(greeter_->stop_fd >= 0);
  const std::map<std::string, Result<comm::SocketAddress>> addresses = look_up_all(places);
  for (const HostPort& place : places) {
    const Result<comm::SocketAddress>& address = addresses.at(place.host);
    if (!address.ok()) {
      outcomes_.push_back({PortState::kUnknownName, place.port, "", address.error().message});
      continue;
    }
    int fd = -1;
    outcomes_.push_back(listen_at(*address, place.port, fd));
    if (fd >= 0) greeter_->listeners.push_back(fd);
  }
  greeter_->thread = std::thread([this] { greeter_->greet(); });
}

Listeners::~Listeners() = default;

namespace {

// One connection being tried.
struct Attempt {
  int fd = -1;
  bool connected = false;
  bool done = false;
  std::string heard;
};

Reach reach_of(int fault) {
  if (fault == ECONNREFUSED) return Reach::kRefused;
  return fault == ETIMEDOUT ? Reach::kTimedOut : Reach::kUnreachable;
}

void begin(const comm::SocketAddress& resolved, int64_t port, Attempt& attempt, ConnectOutcome& outcome) {
  outcome.address = numeric(resolved);
  const Result<comm::SocketAddress> address = with_port(outcome.address, port);
  attempt.fd = address.ok() ? make_socket(*address) : -1;
  if (attempt.fd >= 0 && (::connect(attempt.fd, address->get(), address->length) == 0 || errno == EINPROGRESS)) return;
  outcome.reach = attempt.fd < 0 ? Reach::kUnreachable : reach_of(errno);
  outcome.text = std::strerror(errno);
  attempt.done = true;
}

void advance(const std::string& token, Attempt& attempt, ConnectOutcome& outcome) {
  if (!attempt.connected) {
    int fault = 0;
    socklen_t length = sizeof fault;
    ::getsockopt(attempt.fd, SOL_SOCKET, SO_ERROR, &fault, &length);
    if (fault != 0) {
      outcome.reach = reach_of(fault);
      outcome.text = std::strerror(fault);
      attempt.done = true;
      return;
    }
    attempt.connected = true;
    if (token.empty()) {
      outcome.reach = Reach::kReached;
      attempt.done = true;
      return;
    }
  }
  char piece[kMaxTokenBytes];
  const ssize_t count = ::recv(attempt.fd, piece, sizeof piece, 0);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (count > 0) attempt.heard.append(piece, static_cast<size_t>(count));
  if (attempt.heard.size() < token.size() && count > 0) return;
  outcome.reach = attempt.heard == token ? Reach::kReached : Reach::kOther;
  attempt.done = true;
}

}  // namespace

std::vector<ConnectOutcome> connect_all(const std::vector<HostPort>& places, const std::string& token,
                                        milliseconds timeout) {
  CHECK_LE(std::ssize(places), kMaxPorts);
  const std::map<std::string, Result<comm::SocketAddress>> addresses = look_up_all(places);
  const SteadyClock clock;
  const int64_t start_us = clock.now_us();
  std::vector<ConnectOutcome> outcomes(places.size());
  std::vector<Attempt> attempts(places.size());
  for (size_t i = 0; i < places.size(); ++i) {
    const Result<comm::SocketAddress>& address = addresses.at(places[i].host);
    if (address.ok()) {
      begin(*address, places[i].port, attempts[i], outcomes[i]);
    } else {
      outcomes[i] = {Reach::kUnknownName, 0, "", address.error().message};
      attempts[i].done = true;
    }
  }
  while (true) {
    const int64_t left_us = timeout.count() * 1000 - (clock.now_us() - start_us);
    std::vector<pollfd> polled;
    std::vector<size_t> which;
    for (size_t i = 0; i < attempts.size(); ++i) {
      if (attempts[i].done) continue;
      polled.push_back({attempts[i].fd, static_cast<short>(attempts[i].connected ? POLLIN : POLLOUT), 0});
      which.push_back(i);
    }
    if (polled.empty() || left_us <= 0) break;
    ::poll(polled.data(), polled.size(), static_cast<int>(left_us / 1000) + 1);
    for (size_t k = 0; k < polled.size(); ++k) {
      if (polled[k].revents == 0) continue;
      advance(token, attempts[which[k]], outcomes[which[k]]);
      outcomes[which[k]].time_us = clock.now_us() - start_us;
    }
  }
  for (size_t i = 0; i < attempts.size(); ++i) {
    if (!attempts[i].done) outcomes[i].reach = attempts[i].connected ? Reach::kOther : Reach::kTimedOut;
    if (attempts[i].fd >= 0) ::close(attempts[i].fd);
  }
  return outcomes;
}

}  // namespace tandem::check
