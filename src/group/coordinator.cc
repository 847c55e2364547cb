#include "src/group/coordinator.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/comm/address.h"
#include "src/comm/meeting.h"
#include "src/group/coordinator_core.h"
#include "src/group/message_stream.h"

namespace tandem::group {
namespace {

constexpr int64_t kMaxSessions = kMaxRanks + 64;  // members, and strangers until they have spoken
constexpr int kMaxEvents = 64;                    // taken from the kernel at a time
constexpr int kMostRounds = 64;                   // of them before time is looked at
constexpr int64_t kNoDescriptorMs = 20;           // pause when there are none
constexpr uint64_t kWakeEvent = 0;
constexpr uint64_t kListenerEvent = 1;
constexpr uint64_t kFirstSession = 2;

class SocketCoordinator final : public Coordinator {
 public:
  SocketCoordinator(const CoordinatorOptions& options, std::function<void(const GroupStatus&)> on_change)
      : core_(options.shape, options.rank_timeout_us, clock_.now_us()), on_change_(std::move(on_change)) {}
  ~SocketCoordinator() override;

  Status start(const CoordinatorOptions& options);
  int64_t port() const override { return port_; }
  GroupStatus status() const override;

 private:
  struct Connection {
    std::unique_ptr<MessageStream> stream;
    bool waits_to_write = false;
  };

  void run();
  void handle_events();
  void accept_all();
  void advance(SessionId id);
  void carry_out();
  void watch_writers();
  void publish();

  SteadyClock clock_;
  CoordinatorCore core_;
  std::function<void(const GroupStatus&)> on_change_;
  int listener_ = -1;
  int64_t port_ = 0;
  int epoll_fd_ = -1;
  int wake_fd_ = -1;
  std::atomic<bool> stops_ = false;
  uint64_t next_session_ = kFirstSession;
  std::map<SessionId, Connection> connections_;
  mutable std::mutex mutex_;
  GroupStatus status_;  // as of status_us_
  int64_t status_us_ = 0;
  std::thread thread_;
};

Status SocketCoordinator::start(const CoordinatorOptions& options) {
  TANDEM_ASSIGN(comm::SocketAddress address, comm::look_up_address(options.host, options.port));
  TANDEM_ASSIGN(listener_, comm::open_listener(address, "the ranks of the group", "--data-parallel-rpc-port"));
  CHECK_EQ(getsockname(listener_, reinterpret_cast<sockaddr*>(&address.storage), &address.length), 0);
  port_ = address.port();
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  CHECK_GE(epoll_fd_, 0);
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  CHECK_GE(wake_fd_, 0);
  for (const auto& [fd, data] : {std::pair{wake_fd_, kWakeEvent}, std::pair{listener_, kListenerEvent}}) {
    epoll_event event{.events = EPOLLIN, .data = {.u64 = data}};
    CHECK_EQ(epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event), 0);
  }
  status_ = core_.status(clock_.now_us());
  status_us_ = clock_.now_us();
  thread_ = std::thread([this] { run(); });
  return {};
}

SocketCoordinator::~SocketCoordinator() {
  stops_ = true;
  if (thread_.joinable()) {
    eventfd_write(wake_fd_, 1);
    thread_.join();
  }
  for (const int fd : {listener_, wake_fd_, epoll_fd_}) {
    if (fd >= 0) ::close(fd);
  }
}

GroupStatus SocketCoordinator::status() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  GroupStatus status = status_;
  const int64_t age_us = clock_.now_us() - status_us_;
  for (MissingRank& missing : status.missing) missing.missing_us += age_us;
  for (Refusal& refusal : status.refusals) refusal.age_us += age_us;
  return status;
}

void SocketCoordinator::run() {
  publish();
  while (!stops_) {
    handle_events();
    // After all that has arrived was heard: this process may have been stopped itself for a while.
    core_.on_time(clock_.now_us());
    carry_out();
    watch_writers();
  }
}

void SocketCoordinator::publish() {
  if (!core_.take_changed()) return;
  const int64_t now_us = clock_.now_us();
  GroupStatus status = core_.status(now_us);
  const bool says_more = status.text != status_.text || status_us_ == 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    status_ = status;
    status_us_ = now_us;
  }
  if (says_more) log_info("group", "{}", status.text);
  if (on_change_) on_change_(status);
}

void SocketCoordinator::handle_events() {
  int64_t timeout_us = std::max<int64_t>(0, core_.next_time_us() - clock_.now_us());
  for (int round = 0; round < kMostRounds; ++round) {
    std::array<epoll_event, kMaxEvents> events{};
    const timespec limit{timeout_us / 1'000'000, timeout_us % 1'000'000 * 1000};
    const int count = epoll_pwait2(epoll_fd_, events.data(), kMaxEvents, &limit, nullptr);
    for (int i = 0; i < count; ++i) {
      const uint64_t data = events[static_cast<size_t>(i)].data.u64;
      if (data == kListenerEvent) accept_all();
      if (data >= kFirstSession) advance(SessionId(data));
    }
    carry_out();
    if (count < kMaxEvents) return;
    timeout_us = 0;
  }
}

void SocketCoordinator::accept_all() {
  while (true) {
    comm::SocketAddress peer;
    const int socket = comm::accept_connection(listener_, &peer);
    if (socket < 0) {
      // Out of descriptors the event stays raised; others may close theirs meanwhile.
      if (errno == EMFILE || errno == ENFILE) std::this_thread::sleep_for(std::chrono::milliseconds(kNoDescriptorMs));
      return;
    }
    if (std::ssize(connections_) >= kMaxSessions) {
      log_warning("group", "refused a connection from {}: all {} are in use", peer.to_string(), kMaxSessions);
      ::close(socket);
      continue;
    }
    const SessionId id(next_session_++);
    epoll_event event{.events = EPOLLIN, .data = {.u64 = id.value}};
    CHECK_EQ(epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, socket, &event), 0);
    connections_[id].stream = std::make_unique<MessageStream>(socket, kMaxRankMessageBytes);
    core_.on_connected(id, peer.to_string(), clock_.now_us());
  }
}

void SocketCoordinator::advance(SessionId id) {
  const auto found = connections_.find(id);
  if (found == connections_.end()) return;
  for (const Result<Message>& message : found->second.stream->advance()) {
    if (message.ok()) {
      core_.on_message(id, *message, clock_.now_us());
    } else {
      core_.on_closed(id, message.error().message, clock_.now_us());
    }
  }
}

void SocketCoordinator::carry_out() {
  publish();  // so that no rank knows more than status()
  for (const CoordinatorAction& action : core_.take_actions()) {
    const auto found = connections_.find(action.session);
    if (found == connections_.end()) continue;
    if (action.message) {
      if (const RefusedMessage* const refused = std::get_if<RefusedMessage>(&*action.message)) {
        log_warning("group", "refused a rank: {}", refused->why);
      }
      found->second.stream->send(*action.message);
    }
    if (action.close) connections_.erase(found);
  }
}

void SocketCoordinator::watch_writers() {
  for (auto& [id, connection] : connections_) {
    const bool waits = connection.stream->wants_write();
    if (waits == std::exchange(connection.waits_to_write, waits)) continue;
    epoll_event event{.events = EPOLLIN | (waits ? static_cast<uint32_t>(EPOLLOUT) : 0U), .data = {.u64 = id.value}};
    CHECK_EQ(epoll_ctl(epoll_fd_, EPOLL_CTL_MOD, connection.stream->socket(), &event), 0);
  }
}

}  // namespace

Result<std::unique_ptr<Coordinator>> Coordinator::listen(const CoordinatorOptions& options,
                                                         std::function<void(const GroupStatus&)> on_change) {
  const int64_t size = int64_t{options.shape.data} * options.shape.tensor;
  if (options.shape.data < 1 || options.shape.tensor < 1 || size > kMaxRanks) {
    return invalid_argument("--data-parallel-size", "a group of {} x {} ranks; 1 … {} are possible", options.shape.data,
                            options.shape.tensor, kMaxRanks);
  }
  if (options.rank_timeout_us < kMinRankTimeoutUs || options.rank_timeout_us > kMaxRankTimeoutUs) {
    return invalid_argument("--rank-timeout", "a rank time-out of {} us; {} … {} are possible", options.rank_timeout_us,
                            kMinRankTimeoutUs, kMaxRankTimeoutUs);
  }
  std::unique_ptr<SocketCoordinator> coordinator = std::make_unique<SocketCoordinator>(options, std::move(on_change));
  TANDEM_TRY(coordinator->start(options));
  return std::unique_ptr<Coordinator>(std::move(coordinator));
}

}  // namespace tandem::group
