// Messenger over UCX active messages.
//  - Each connection has its own UCX worker and with it its own receive queue, so that a peer which dies or freezes
//    while it writes can block nobody else.
//  - Peers exchange worker addresses over a plain socket (meeting.h). UCX's own connection manager would begin on TCP
//    and change to shared memory in mid-flight, reordering messages and replaying queued ones on a transport for
//    which they were not made; with addresses the transport is fixed from the start.
//  - Callbacks of UCX run inside progress() of one worker, where endpoints must not be made or closed. They only mark;
//    poll() does the rest between two rounds of progress.
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <map>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/comm/address.h"
#include "src/comm/look_ups.h"
#include "src/comm/meeting.h"
#include "src/comm/messenger.h"
#include "src/comm/ucx_settings.h"

namespace tandem::comm {
namespace {

constexpr unsigned kMessageId = 1;         // the one active-message id
constexpr int kProgressRounds = 16;        // per worker and poll(), so that no connection starves the others
constexpr int64_t kSpinUs = 20;            // after traffic, before sleeping
constexpr int kMaxFruitlessRounds = 64;    // of work inside UCX that leads to no event
constexpr int64_t kMinBackoffUs = 50;      // after them: pauses of this length …
constexpr int64_t kMaxBackoffUs = 1000;    // … doubling up to this
constexpr int64_t kFlushUs = 50'000;       // at the end, for messages that the transport has not finished
constexpr int64_t kShutdownUs = 500'000;   // then for closing all connections
constexpr int64_t kCloseUs = 500'000;        // for closing one; UCX may wait for room in the queue of a peer that is dead
constexpr int kLastRounds = 256;           // of progress when a peer is lost: it may have spoken before
constexpr int64_t kMeetingUs = 5'000'000;  // from an accepted socket to an exchanged address
constexpr int64_t kSocketCheckUs = 1000;   // under load, how often sockets are looked at
constexpr int kMaxEvents = 64;             // taken from the kernel at a time

struct Connection;

// One message on its way out. The bytes of the message live here; those of the payload with the caller.
struct OutgoingMessage {
  Connection* connection = nullptr;
  uint64_t token = 0;
  std::span<const std::byte> payload;
  size_t message_size = 0;
  std::array<std::byte, kMaxHeaderBytes> inline_bytes{};
  std::vector<std::byte> long_bytes;  // used if the message is longer than the array

  const std::byte* message() const { return message_size <= kMaxHeaderBytes ? inline_bytes.data() : long_bytes.data(); }
};

class UcxMessenger;

struct Connection {
  UcxMessenger* owner = nullptr;
  ConnectionId id;
  std::string peer;  // for messages: "127.0.0.1:9000"
  std::unique_ptr<Meeting> meeting;
  int64_t meeting_deadline_us = 0;
  ucp_worker_h worker = nullptr;
  ucp_ep_h endpoint = nullptr;
  ucs_status_ptr_t closing = nullptr;  // set while UCX closes the endpoint
  int64_t close_deadline_us = 0;       // then the worker is destroyed with what it still has
  bool heard = false;                  // at least one message came
  bool closed_by_us = false;
  bool misbehaved = false;  // what it says is not wanted any more
  bool close_done = false;
  std::optional<Error> failure;
  std::deque<std::unique_ptr<OutgoingMessage>> waiting;                                    // until the endpoint exists
  std::unordered_map<const OutgoingMessage*, std::unique_ptr<OutgoingMessage>> in_flight;  // taken by UCX, not finished
};

class UcxMessenger final : public Messenger {
 public:
  explicit UcxMessenger(MessageHandler& handler) : handler_(handler) {}
  ~UcxMessenger() override;

  Status start(const MessengerOptions& options);

  int64_t port() const override { return port_; }
  Result<ConnectionId> connect(const std::string& host, int64_t port) override;
  SendResult send(ConnectionId connection, std::span<const std::byte> message, std::span<const std::byte> payload,
                  uint64_t token) override;
  void close(ConnectionId connection) override;
  std::string transport_name(ConnectionId connection) const override;
  void poll(int64_t timeout_us) override;
  void wake() override;

  // Called back by UCX.
  ucs_status_t on_arrival(Connection& connection, const void* header, size_t header_length, const void* data,
                          size_t length, const ucp_am_recv_param_t& param);
  void on_send_end(Connection& connection, const OutgoingMessage* message);
  void on_endpoint_error(Connection& connection, ucs_status_t status);

 private:
  Connection& add_connection(std::string peer);
  Status open_worker(Connection& connection);
  void begin_meeting(Connection& connection, int socket);
  Status say_address(Connection& connection);
  void open_to(ConnectionId id, const SocketAddress& address);
  void accept_all();
  void advance_meeting(Connection& connection);
  void open_endpoint(Connection& connection);
  void fail(Connection& connection, Error error);
  SendResult hand_over(Connection& connection, std::unique_ptr<OutgoingMessage> message);
  std::unique_ptr<OutgoingMessage> take_blank();
  void recycle(std::unique_ptr<OutgoingMessage> message);
  bool progress_all();
  void flush();
  void open_new();
  void end_late_meetings();
  void sweep_closed();
  void finish(Connection& connection);
  bool arm_all();
  void handle_sockets(int64_t timeout_us);
  std::vector<Connection*> list_connections();

  MessageHandler& handler_;
  std::string device_;
  ucp_context_h context_ = nullptr;
  int listener_ = -1;
  int64_t port_ = 0;
  int epoll_fd_ = -1;       // our own sockets and wake()
  int all_events_fd_ = -1;  // and those of the workers, which stay raised while UCX has unfinished work
  int wake_fd_ = -1;
  std::atomic<bool> wake_pending_{false};
  uint64_t next_id_ = 1;
  std::map<ConnectionId, std::unique_ptr<Connection>> connections_;
  std::vector<std::pair<ConnectionId, SocketAddress>> to_open_;  // connect() was called
  std::unordered_set<ConnectionId> meeting_;                     // exchanging addresses
  std::unique_ptr<LookUps> look_ups_;
  std::vector<std::unique_ptr<OutgoingMessage>> blanks_;
  std::unordered_set<ConnectionId> marked_;  // connections with something to sweep
  SteadyClock clock_;
  uint64_t num_events_ = 0;  // messages arrived and sent, connections opened and closed
  int64_t last_event_us_ = 0;
  int64_t last_socket_check_us_ = 0;
  int fruitless_rounds_ = 0;
  int64_t backoff_us_ = kMinBackoffUs;
};

// --- start and stop ---

// What an event of the kernel is about: the low bits of its data, the connection above them.
enum EventKind : uint64_t { kWakeEvent = 0, kListenerEvent = 1, kSocketEvent = 2 };

void watch(int epoll_fd, int operation, int fd, EventKind kind, ConnectionId id, bool for_write = false) {
  epoll_event event{};
  event.events = EPOLLIN | (for_write ? static_cast<uint32_t>(EPOLLOUT) : 0U);
  event.data.u64 = (id.value << 2) | kind;
  CHECK_EQ(epoll_ctl(epoll_fd, operation, fd, &event), 0);
}

Status UcxMessenger::start(const MessengerOptions& options) {
  TANDEM_ASSIGN(SocketAddress address, look_up_address(options.listen_host, options.listen_port));
  TANDEM_ASSIGN(device_, find_device(address));
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  CHECK_GE(epoll_fd_, 0);
  all_events_fd_ = epoll_create1(EPOLL_CLOEXEC);
  CHECK_GE(all_events_fd_, 0);
  watch(all_events_fd_, EPOLL_CTL_ADD, epoll_fd_, kWakeEvent, {});
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  CHECK_GE(wake_fd_, 0);
  watch(epoll_fd_, EPOLL_CTL_ADD, wake_fd_, kWakeEvent, {});
  look_ups_ = std::make_unique<LookUps>(wake_fd_);
  TANDEM_ASSIGN(context_, make_ucx_context(device_, options.transport != Transport::kUcxTcp));
  TANDEM_ASSIGN(listener_, open_listener(address, "KV transfers", "kv_port"));
  watch(epoll_fd_, EPOLL_CTL_ADD, listener_, kListenerEvent, {});
  CHECK_EQ(getsockname(listener_, reinterpret_cast<sockaddr*>(&address.storage), &address.length), 0);
  port_ = address.port();
  return {};
}

UcxMessenger::~UcxMessenger() {
  look_ups_.reset();
  if (listener_ >= 0) ::close(listener_);
  flush();
  for (Connection* connection : list_connections()) close(connection->id);
  const int64_t deadline_us = clock_.now_us() + kShutdownUs;
  while (!connections_.empty() && clock_.now_us() < deadline_us) {
    progress_all();
    sweep_closed();
  }
  for (Connection* connection : list_connections()) {
    if (connection->worker != nullptr) ucp_worker_destroy(connection->worker);
  }
  if (context_ != nullptr) ucp_cleanup(context_);
  if (wake_fd_ >= 0) ::close(wake_fd_);
  if (all_events_fd_ >= 0) ::close(all_events_fd_);
  if (epoll_fd_ >= 0) ::close(epoll_fd_);
}

void UcxMessenger::flush() {
  const int64_t deadline_us = clock_.now_us() + kFlushUs;
  const auto unfinished = [](const Connection* connection) {
    return connection->endpoint != nullptr && !connection->failure.has_value() && !connection->in_flight.empty();
  };
  while (clock_.now_us() < deadline_us) {
    const std::vector<Connection*> list = list_connections();
    if (std::none_of(list.begin(), list.end(), unfinished)) return;
    progress_all();
  }
}

// --- connections ---

std::vector<Connection*> UcxMessenger::list_connections() {
  std::vector<Connection*> list;
  list.reserve(connections_.size());
  for (const auto& [id, connection] : connections_) list.push_back(connection.get());
  return list;
}

Connection& UcxMessenger::add_connection(std::string peer) {
  std::unique_ptr<Connection> connection = std::make_unique<Connection>();
  connection->owner = this;
  connection->id = ConnectionId(next_id_++);
  connection->peer = std::move(peer);
  Connection& added = *connection;
  connections_.emplace(added.id, std::move(connection));
  return added;
}

Result<ConnectionId> UcxMessenger::connect(const std::string& host, int64_t port) {
  if (port < 1 || port > 65535) return invalid_argument("remote_port", "port {} is not in 1 … 65535", port);
  if (host.empty() || host.size() > 253) return invalid_argument("remote_host", "a host name has 1 … 253 characters");
  if (std::ssize(connections_) >= kMaxConnections) {
    return make_error(ErrorKind::kResourceExhausted, "all {} transfer connections are in use", kMaxConnections);
  }
  const std::optional<SocketAddress> address = parse_address(host, port);
  if (address.has_value()) {
    const ConnectionId id = add_connection(address->to_string()).id;
    to_open_.emplace_back(id, *address);
    return id;
  }
  const ConnectionId id = add_connection(fmt::format("{}:{}", host, port)).id;
  if (const Status started = look_ups_->start(id, host, port); !started.ok()) {
    connections_.erase(id);
    return started.error();
  }
  return id;
}

Status UcxMessenger::open_worker(Connection& connection) {
  ucp_worker_params_t worker_params{};
  worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker_params.thread_mode = UCS_THREAD_MODE_SINGLE;
  ucs_status_t status = ucp_worker_create(context_, &worker_params, &connection.worker);
  if (status != UCS_OK) {
    connection.worker = nullptr;
    return make_error(ErrorKind::kUnavailable,
                      "UCX cannot open its transports ({}); is /dev/shm full or the limit of open files too low?",
                      ucs_status_string(status));
  }
  int event_fd = -1;
  status = ucp_worker_get_efd(connection.worker, &event_fd);
  CHECK_EQ(static_cast<int>(status), static_cast<int>(UCS_OK));
  watch(all_events_fd_, EPOLL_CTL_ADD, event_fd, kWakeEvent, connection.id);
  ucp_am_handler_param_t params{};
  params.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  params.id = kMessageId;
  params.cb = [](void* argument, const void* header, size_t header_length, void* data, size_t length,
                 const ucp_am_recv_param_t* param) {
    Connection& to = *static_cast<Connection*>(argument);
    return to.owner->on_arrival(to, header, header_length, data, length, *param);
  };
  params.arg = &connection;
  status = ucp_worker_set_am_recv_handler(connection.worker, &params);
  CHECK_EQ(static_cast<int>(status), static_cast<int>(UCS_OK));
  return {};
}

// Takes the socket.
void UcxMessenger::begin_meeting(Connection& connection, int socket) {
  connection.meeting = std::make_unique<Meeting>(socket);
  connection.meeting_deadline_us = clock_.now_us() + kMeetingUs;
  meeting_.insert(connection.id);
  watch(epoll_fd_, EPOLL_CTL_ADD, socket, kSocketEvent, connection.id);
}

Status UcxMessenger::say_address(Connection& connection) {
  TANDEM_TRY(open_worker(connection));
  ucp_address_t* address = nullptr;
  size_t length = 0;
  const ucs_status_t status = ucp_worker_get_address(connection.worker, &address, &length);
  CHECK_EQ(static_cast<int>(status), static_cast<int>(UCS_OK));
  connection.meeting->say(std::as_bytes(std::span(reinterpret_cast<const char*>(address), length)));
  ucp_worker_release_address(connection.worker, address);
  watch(epoll_fd_, EPOLL_CTL_MOD, connection.meeting->socket(), kSocketEvent, connection.id, /*for_write=*/true);
  return {};
}

void UcxMessenger::open_to(ConnectionId id, const SocketAddress& address) {
  const auto found = connections_.find(id);
  if (found == connections_.end() || found->second->closed_by_us) return;
  Connection& connection = *found->second;
  const Result<int> socket = start_connect(address);
  if (!socket.ok()) {
    fail(connection,
         make_error(ErrorKind::kUnavailable, "cannot connect to {}: {}", connection.peer, socket.error().message));
    return;
  }
  begin_meeting(connection, *socket);
  const Status said = say_address(connection);
  if (!said.ok()) fail(connection, said.error());
}

void UcxMessenger::accept_all() {
  while (true) {
    SocketAddress peer;
    const int socket = accept_connection(listener_, &peer);
    if (socket < 0) return;
    if (std::ssize(connections_) >= kMaxConnections) {
      log_warning("comm", "refused a connection from {}: all {} are in use", peer.to_string(), kMaxConnections);
      ::close(socket);
      continue;
    }
    Connection& connection = add_connection(peer.to_string());
    begin_meeting(connection, socket);
    handler_.on_accept(connection.id);
  }
}

// Who accepted speaks second: a stranger who only connects costs a socket, not a set of transports.
void UcxMessenger::advance_meeting(Connection& connection) {
  if (connection.meeting == nullptr || connection.closed_by_us || connection.failure.has_value()) return;
  Meeting& meeting = *connection.meeting;
  Status status = meeting.advance();
  if (status.ok() && meeting.has_heard() && !meeting.has_spoken()) {
    status = say_address(connection);
    if (status.ok()) status = meeting.advance();
  }
  if (!status.ok()) {
    const char* what = connection.endpoint == nullptr ? "cannot connect to" : "lost the connection to";
    fail(connection, make_error(ErrorKind::kUnavailable, "{} {}: {}", what, connection.peer, status.error().message));
    return;
  }
  if (connection.endpoint != nullptr) return;
  ++num_events_;
  watch(epoll_fd_, EPOLL_CTL_MOD, meeting.socket(), kSocketEvent, connection.id, meeting.wants_write());
  if (meeting.has_heard() && !meeting.wants_write()) open_endpoint(connection);
}

void UcxMessenger::open_endpoint(Connection& connection) {
  meeting_.erase(connection.id);
  ucp_ep_params_t params{};
  params.field_mask =
      UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(connection.meeting->peer_address().data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = [](void* argument, ucp_ep_h, ucs_status_t status) {
    Connection& failed = *static_cast<Connection*>(argument);
    failed.owner->on_endpoint_error(failed, status);
  };
  params.err_handler.arg = &connection;
  const ucs_status_t status = ucp_ep_create(connection.worker, &params, &connection.endpoint);
  if (status != UCS_OK) {
    connection.endpoint = nullptr;
    fail(connection, make_error(ErrorKind::kUnavailable, "no transport of {} reaches {}: {}", device_, connection.peer,
                                ucs_status_string(status)));
    return;
  }
  while (!connection.waiting.empty()) {
    std::unique_ptr<OutgoingMessage> message = std::move(connection.waiting.front());
    connection.waiting.pop_front();
    const uint64_t token = message->token;
    if (hand_over(connection, std::move(message)) != SendResult::kPending && token != 0) {
      handler_.on_sent(connection.id, token);
    }
  }
}

void UcxMessenger::fail(Connection& connection, Error error) {
  if (!connection.failure.has_value()) connection.failure = std::move(error);
  marked_.insert(connection.id);
}

void UcxMessenger::on_endpoint_error(Connection& connection, ucs_status_t status) {
  fail(connection, make_error(ErrorKind::kUnavailable, "lost the connection to {}: {}", connection.peer,
                              ucs_status_string(status)));
}

void UcxMessenger::close(ConnectionId id) {
  const auto found = connections_.find(id);
  if (found == connections_.end()) return;
  found->second->closed_by_us = true;
  marked_.insert(id);
}

std::string UcxMessenger::transport_name(ConnectionId id) const {
  const auto found = connections_.find(id);
  if (found == connections_.end() || found->second->endpoint == nullptr || !found->second->heard) return "connecting";
  return "ucx " + describe_transport(found->second->endpoint);
}

// --- messages ---

std::unique_ptr<OutgoingMessage> UcxMessenger::take_blank() {
  if (blanks_.empty()) return std::make_unique<OutgoingMessage>();
  std::unique_ptr<OutgoingMessage> blank = std::move(blanks_.back());
  blanks_.pop_back();
  return blank;
}

void UcxMessenger::recycle(std::unique_ptr<OutgoingMessage> message) {
  constexpr size_t kMaxBlanks = 256;
  message->long_bytes.clear();
  if (blanks_.size() < kMaxBlanks) blanks_.push_back(std::move(message));
}

SendResult UcxMessenger::send(ConnectionId id, std::span<const std::byte> bytes, std::span<const std::byte> payload,
                              uint64_t token) {
  CHECK(!bytes.empty());
  CHECK_LE(std::ssize(bytes), payload.empty() ? kMaxMessageBytes : kMaxHeaderBytes);
  CHECK_LE(std::ssize(payload), kMaxPayloadBytes);
  const auto found = connections_.find(id);
  if (found == connections_.end()) return SendResult::kClosed;
  Connection& connection = *found->second;
  if (connection.closed_by_us || connection.failure.has_value()) return SendResult::kClosed;
  if (std::ssize(connection.waiting) + std::ssize(connection.in_flight) >= kMaxSendsPerConnection) {
    fail(connection, make_error(ErrorKind::kUnavailable, "{} does not read: {} messages wait for it", connection.peer,
                                kMaxSendsPerConnection));
    return SendResult::kClosed;
  }
  std::unique_ptr<OutgoingMessage> message = take_blank();
  message->token = token;
  message->payload = payload;
  message->message_size = bytes.size();
  if (bytes.size() <= message->inline_bytes.size()) {
    std::copy(bytes.begin(), bytes.end(), message->inline_bytes.begin());
  } else {
    message->long_bytes.assign(bytes.begin(), bytes.end());
  }
  if (connection.endpoint == nullptr) {
    connection.waiting.push_back(std::move(message));
    return SendResult::kPending;
  }
  return hand_over(connection, std::move(message));
}

// A message with a payload travels as header and data, one without as data alone.
SendResult UcxMessenger::hand_over(Connection& connection, std::unique_ptr<OutgoingMessage> message) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.flags = UCP_AM_SEND_FLAG_EAGER;  // never a rendezvous: that would exchange memory addresses
  message->connection = &connection;
  param.user_data = message.get();
  param.cb.send = [](void* request, ucs_status_t, void* user_data) {
    ucp_request_free(request);
    const OutgoingMessage* ended = static_cast<OutgoingMessage*>(user_data);
    ended->connection->owner->on_send_end(*ended->connection, ended);
  };
  const bool has_payload = !message->payload.empty();
  const void* data = has_payload ? message->payload.data() : message->message();
  const size_t data_size = has_payload ? message->payload.size() : message->message_size;
  const ucs_status_ptr_t result =
      ucp_am_send_nbx(connection.endpoint, kMessageId, has_payload ? message->message() : nullptr,
                      has_payload ? message->message_size : 0, data, data_size, &param);
  if (UCS_PTR_IS_PTR(result)) {
    const OutgoingMessage* key = message.get();
    connection.in_flight.emplace(key, std::move(message));
    return SendResult::kPending;
  }
  recycle(std::move(message));
  if (UCS_PTR_IS_ERR(result)) {
    on_endpoint_error(connection, UCS_PTR_STATUS(result));
    return SendResult::kClosed;
  }
  return SendResult::kSent;
}

void UcxMessenger::on_send_end(Connection& connection, const OutgoingMessage* message) {
  const auto found = connection.in_flight.find(message);
  CHECK(found != connection.in_flight.end());
  std::unique_ptr<OutgoingMessage> owned = std::move(found->second);
  connection.in_flight.erase(found);
  const uint64_t token = owned->token;
  ++num_events_;
  recycle(std::move(owned));
  if (token != 0) handler_.on_sent(connection.id, token);
}

ucs_status_t UcxMessenger::on_arrival(Connection& connection, const void* header, size_t header_length,
                                      const void* data, size_t length, const ucp_am_recv_param_t& param) {
  ++num_events_;
  if (connection.closed_by_us || connection.misbehaved) return UCS_OK;
  const bool offered = (param.recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  if (offered || length > static_cast<size_t>(kMaxPayloadBytes) ||
      header_length > static_cast<size_t>(kMaxHeaderBytes)) {
    fail(connection,
         make_error(ErrorKind::kUnavailable, "{} sent a message of {} + {} bytes; at most {} + {} are taken",
                    connection.peer, header_length, length, kMaxHeaderBytes, kMaxPayloadBytes));
    connection.misbehaved = true;
    return UCS_OK;
  }
  connection.heard = true;
  const std::span<const std::byte> first(static_cast<const std::byte*>(header), header_length);
  const std::span<const std::byte> second(static_cast<const std::byte*>(data), length);
  if (header_length == 0) {
    handler_.on_message(connection.id, second, {});
  } else {
    handler_.on_message(connection.id, first, second);
  }
  return UCS_OK;
}

// --- the loop ---

bool UcxMessenger::progress_all() {
  bool any = false;
  for (Connection* connection : list_connections()) {
    if (connection->worker == nullptr) continue;
    for (int round = 0; round < kProgressRounds && ucp_worker_progress(connection->worker) != 0; ++round) any = true;
  }
  return any;
}

void UcxMessenger::open_new() {
  const std::vector<std::pair<ConnectionId, Result<SocketAddress>>> looked_up = look_ups_->take();
  num_events_ += looked_up.size() + to_open_.size();
  for (const auto& [id, address] : looked_up) {
    const auto found = connections_.find(id);
    if (found == connections_.end()) continue;
    if (address.ok()) {
      to_open_.emplace_back(id, *address);
    } else {
      fail(*found->second, address.error());
    }
  }
  for (const auto& [id, address] : std::exchange(to_open_, {})) open_to(id, address);
}

void UcxMessenger::end_late_meetings() {
  for (const ConnectionId id : meeting_) {
    Connection& connection = *connections_.at(id);
    if (connection.failure.has_value() || clock_.now_us() < connection.meeting_deadline_us) continue;
    fail(connection,
         make_error(ErrorKind::kUnavailable, "{} did not answer within {} s", connection.peer, kMeetingUs / 1'000'000));
  }
}

// Closes what has failed or was closed by us.
void UcxMessenger::sweep_closed() {
  for (const ConnectionId id : std::vector<ConnectionId>(marked_.begin(), marked_.end())) {
    Connection& connection = *connections_.at(id);
    connection.meeting.reset();  // tells the peer, and ends the socket's events
    if (connection.endpoint != nullptr && connection.closing == nullptr && !connection.close_done) {
      for (int round = 0; !connection.closed_by_us && round < kLastRounds; ++round) {
        if (ucp_worker_progress(connection.worker) == 0) break;
      }
      ucp_request_param_t param{};
      param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
      param.flags = UCP_EP_CLOSE_FLAG_FORCE;
      const ucs_status_ptr_t result = ucp_ep_close_nbx(connection.endpoint, &param);
      if (UCS_PTR_IS_PTR(result)) {
        connection.closing = result;
        connection.close_deadline_us = clock_.now_us() + kCloseUs;
      } else {
        connection.close_done = true;
      }
    }
    if (connection.closing != nullptr && ucp_request_check_status(connection.closing) != UCS_INPROGRESS) {
      ucp_request_free(connection.closing);
      connection.closing = nullptr;
      connection.close_done = true;
    }
    if (connection.closing != nullptr && clock_.now_us() >= connection.close_deadline_us) {
      log_warning("comm", "the connection to {} did not close within {} ms", connection.peer, kCloseUs / 1000);
      connection.close_done = true;
    }
    if (connection.endpoint == nullptr || connection.close_done) {
      ++num_events_;
      marked_.erase(id);
      finish(connection);
    }
  }
}

void UcxMessenger::finish(Connection& connection) {
  meeting_.erase(connection.id);
  if (connection.worker != nullptr) ucp_worker_destroy(connection.worker);
  const std::unique_ptr<Connection> owned = std::move(connections_.at(connection.id));
  connections_.erase(owned->id);
  // The worker is gone, so nothing reads these payloads any more.
  for (const auto& [key, message] : owned->in_flight) {
    if (message->token != 0) handler_.on_sent(owned->id, message->token);
  }
  for (const std::unique_ptr<OutgoingMessage>& message : owned->waiting) {
    if (message->token != 0) handler_.on_sent(owned->id, message->token);
  }
  if (!owned->closed_by_us) handler_.on_closed(owned->id, *owned->failure);
}

int wait_for_events(int fd, epoll_event* events, int max_events, int64_t timeout_us) {
  const timespec limit{static_cast<time_t>(timeout_us / 1'000'000), static_cast<long>(timeout_us % 1'000'000 * 1000)};
  return epoll_pwait2(fd, events, max_events, &limit, nullptr);
}

void UcxMessenger::poll(int64_t timeout_us) {
  const int64_t now_us = clock_.now_us();
  if (now_us - last_socket_check_us_ >= kSocketCheckUs) handle_sockets(0);
  const uint64_t events_before = num_events_;
  open_new();
  const bool worked = progress_all();
  end_late_meetings();
  sweep_closed();
  if (num_events_ != events_before) {
    last_event_us_ = clock_.now_us();
    fruitless_rounds_ = 0;
    backoff_us_ = kMinBackoffUs;
    return;
  }
  if (timeout_us <= 0 || now_us - last_event_us_ < kSpinUs) return;
  if (!meeting_.empty()) timeout_us = std::min(timeout_us, kMeetingUs / 4);
  if (!marked_.empty()) timeout_us = std::min(timeout_us, kMaxBackoffUs);  // the end of a close raises no event
  if (!worked && arm_all()) {
    epoll_event ignored{};
    wait_for_events(all_events_fd_, &ignored, 1, timeout_us);
    handle_sockets(0);
    return;
  }
  // UCX has work in hand. Either it leads to something soon, or it is a message for a queue that stays full because
  // the peer does not read; no event would tell of its reading, so look again now and then.
  if (++fruitless_rounds_ < kMaxFruitlessRounds) return;
  handle_sockets(std::min(timeout_us, backoff_us_));
  backoff_us_ = std::min(2 * backoff_us_, kMaxBackoffUs);
}

// True if every worker will raise its event for the next arrival.
bool UcxMessenger::arm_all() {
  for (Connection* connection : list_connections()) {
    if (connection->worker != nullptr && ucp_worker_arm(connection->worker) != UCS_OK) return false;
  }
  return true;
}

void UcxMessenger::handle_sockets(int64_t timeout_us) {
  std::array<epoll_event, kMaxEvents> events{};
  const int count = wait_for_events(epoll_fd_, events.data(), kMaxEvents, timeout_us);
  last_socket_check_us_ = clock_.now_us();
  for (int i = 0; i < count; ++i) {
    const uint64_t data = events[static_cast<size_t>(i)].data.u64;
    if ((data & 3) == kListenerEvent) accept_all();
    if ((data & 3) == kWakeEvent) {
      eventfd_t ignored = 0;
      eventfd_read(wake_fd_, &ignored);
      wake_pending_.store(false);  // after the read: a wake() in between is served by this return
    }
    if ((data & 3) != kSocketEvent) continue;
    const auto found = connections_.find(ConnectionId(data >> 2));
    if (found != connections_.end()) advance_meeting(*found->second);
  }
}

void UcxMessenger::wake() {
  if (!wake_pending_.exchange(true)) eventfd_write(wake_fd_, 1);
}

}  // namespace

Result<std::unique_ptr<Messenger>> make_ucx_messenger(const MessengerOptions& options, MessageHandler& handler) {
  std::unique_ptr<UcxMessenger> messenger = std::make_unique<UcxMessenger>(handler);
  TANDEM_TRY(messenger->start(options));
  return std::unique_ptr<Messenger>(std::move(messenger));
}

}  // namespace tandem::comm
