#include "src/group/membership.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/comm/address.h"
#include "src/comm/meeting.h"
#include "src/group/coordinator_core.h"
#include "src/group/epoch_memory.h"
#include "src/group/message_stream.h"
#include "src/group/network_fabric.h"
#include "src/group/network_port.h"

namespace tandem::group {
namespace {

constexpr int64_t kMinBackoffUs = 20'000;     // between attempts to join …
constexpr int64_t kMaxBackoffUs = 1'000'000;  // … doubling up to this
constexpr int64_t kIdleUs = 60'000'000;       // longest sleep while nothing is due

// What one epoch needs. The last goes first.
struct EpochParts {
  std::unique_ptr<EpochMemory> memory;
  std::unique_ptr<NetworkPort> port;  // if there are ranks of other nodes
  std::unique_ptr<Fabric> fabric;     // when all are reached
};

class RankMembership final : public Membership {
 public:
  RankMembership(const MembershipOptions& options, std::function<void()> on_change)
      : options_(options), on_change_(std::move(on_change)) {
    options_.facts.push_back({"window bytes", std::to_string(options.window_bytes)});
  }
  ~RankMembership() override;

  Status start();
  RankId rank() const override { return options_.rank; }
  int32_t size() const override { return options_.shape.size(); }
  comm::Bell& bell() override { return *bell_; }
  Fabric* fabric() override;
  void report(const Error& why, std::optional<RankId> suspect) override;
  Status status() const override;

 private:
  enum class Link : uint8_t { kNone, kConnecting, kJoined };

  // --- all of these on the membership's thread ---
  void run();
  void wait_for_events();
  void connect();
  void finish_connecting();
  void hear();
  Status handle(const Message& message);
  Status handle_form(const FormMessage& form);
  Status handle_map(const MapMessage& map);
  void handle_open(Epoch epoch);
  void handle_ended(const EndedMessage& ended);
  void make_window();
  bool is_remote(int32_t rank) const { return forming_->nodes[static_cast<size_t>(rank)] != options_.node; }
  std::vector<bool> list_remote() const;
  Result<std::string> find_network_host() const;
  Status open_port();
  void check_network();
  void fail_forming(const Error& why, int32_t suspect);
  void send_faults();
  void keep_time();
  void lose_link(const std::string& why);
  void end_epoch(const Error& why);
  void set_status(std::optional<Error> error);
  bool put_status(std::optional<Error> error);
  void tell_status(bool has_changed);
  bool engine_holds_epoch();
  int64_t next_time_us();
  void back_off() {
    next_attempt_us_ = clock_.now_us() + backoff_us_;
    backoff_us_ = std::min(2 * backoff_us_, kMaxBackoffUs);
  }
  void wake() { eventfd_write(wake_fd_, 1); }
  std::string coordinator_name() const {
    return fmt::format("the coordinator at {}:{}", options_.coordinator_host, options_.coordinator_port);
  }
  int64_t beat_us() const { return options_.rank_timeout_us / kBeatsPerTimeout; }

  MembershipOptions options_;
  std::function<void()> on_change_;
  SteadyClock clock_;
  const uint64_t incarnation_ = random_u64();
  comm::SharedRegion bell_region_;
  std::optional<comm::Bell> bell_;
  int wake_fd_ = -1;
  std::atomic<bool> stops_ = false;

  Link link_ = Link::kNone;
  std::unique_ptr<MessageStream> stream_;
  uint64_t attempt_ = 0;
  uint64_t last_epoch_ = 0;
  int64_t next_attempt_us_ = 0;
  int64_t backoff_us_ = kMinBackoffUs;
  int64_t heard_us_ = 0;
  int64_t next_beat_us_ = 0;
  std::optional<FormMessage> forming_;
  std::optional<EpochParts> parts_;  // of the epoch being formed
  std::string logged_refusal_;       // the last one

  mutable std::mutex mutex_;
  std::optional<EpochParts> current_;  // of the epoch that stands, or stood and is still held by the engine thread
  bool engine_has_it_ = false;         // it has been given out by fabric()
  std::optional<FaultMessage> fault_;  // to be sent
  // Why no epoch stands; whatever changes current_ changes it under the same lock.
  std::optional<Error> error_ = make_error(ErrorKind::kUnavailable, "not yet joined");
  std::thread thread_;
};

Status RankMembership::start() {
  TANDEM_ASSIGN(bell_region_, comm::SharedRegion::create("tandem-bell", comm::Bell::kBytes));
  bell_.emplace(bell_region_.data());
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  CHECK_GE(wake_fd_, 0);
  thread_ = std::thread([this] { run(); });
  return {};
}

RankMembership::~RankMembership() {
  stops_ = true;
  if (thread_.joinable()) {
    wake();
    thread_.join();
  }
  if (wake_fd_ >= 0) ::close(wake_fd_);
}

// --- the engine thread's side ---

Fabric* RankMembership::fabric() {
  std::optional<EpochParts> old;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!current_) return nullptr;
    if (current_->fabric->status().ok()) {
      engine_has_it_ = true;
      return current_->fabric.get();
    }
    // The network ended it, and nobody has told the coordinator yet.
    if (!error_) {
      error_ = current_->fabric->status().error();
      fault_ = FaultMessage{current_->fabric->epoch(), -1, clip_text(error_->message)};
    }
    old = std::exchange(current_, std::nullopt);
    engine_has_it_ = false;
  }
  old.reset();
  wake();
  return nullptr;
}

void RankMembership::report(const Error& why, std::optional<RankId> suspect) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!current_ || !engine_has_it_ || !current_->fabric->status().ok()) return;
    current_->fabric->end(why);
    error_ = why;
    fault_ = FaultMessage{current_->fabric->epoch(), suspect ? suspect->value : -1, clip_text(why.message)};
  }
  wake();
}

Status RankMembership::status() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return error_ ? Status(*error_) : Status();
}

bool RankMembership::engine_holds_epoch() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return current_.has_value();
}

// --- the loop ---

void RankMembership::run() {
  while (!stops_) {
    // Not while the engine computes in an old epoch: the group need not wait for what comes too late.
    if (link_ == Link::kNone && clock_.now_us() >= next_attempt_us_ && !engine_holds_epoch()) connect();
    wait_for_events();
    send_faults();
    make_window();
    check_network();
    keep_time();
  }
  end_epoch(make_error(ErrorKind::kAborted, "rank {} has left the group", options_.rank));
  if (link_ == Link::kJoined) stream_->send(LeaveMessage{"it was told to stop"});
  stream_.reset();
}

void RankMembership::wait_for_events() {
  std::array<pollfd, 2> fds{pollfd{wake_fd_, POLLIN, 0}, pollfd{-1, POLLIN, 0}};
  if (stream_ != nullptr) {
    fds[1].fd = stream_->socket();
    if (link_ == Link::kConnecting || stream_->wants_write()) fds[1].events |= POLLOUT;
  }
  const int64_t timeout_us = std::clamp<int64_t>(next_time_us() - clock_.now_us(), 0, kIdleUs);
  const timespec limit{timeout_us / 1'000'000, timeout_us % 1'000'000 * 1000};
  if (::ppoll(fds.data(), fds.size(), &limit, nullptr) <= 0) return;
  if (fds[0].revents != 0) {
    eventfd_t ignored = 0;
    eventfd_read(wake_fd_, &ignored);
  }
  if (fds[1].revents == 0) return;
  if (link_ == Link::kConnecting) finish_connecting();
  if (link_ == Link::kJoined) hear();
}

int64_t RankMembership::next_time_us() {
  switch (link_) {
    case Link::kNone: return engine_holds_epoch() ? clock_.now_us() + kIdleUs : next_attempt_us_;
    case Link::kConnecting: return heard_us_ + options_.rank_timeout_us;
    case Link::kJoined: return std::min(next_beat_us_, heard_us_ + kSilentBeats * beat_us());
  }
  return 0;
}

void RankMembership::keep_time() {
  const int64_t now_us = clock_.now_us();
  const int64_t silent_us = now_us - heard_us_;
  if (link_ == Link::kConnecting && silent_us >= options_.rank_timeout_us) {
    lose_link(fmt::format("{} does not answer", coordinator_name()));
  }
  if (link_ != Link::kJoined) return;
  if (silent_us >= kSilentBeats * beat_us()) {
    lose_link(fmt::format("{} is silent for {:.1f} s", coordinator_name(), static_cast<double>(silent_us) * 1e-6));
  } else if (now_us >= next_beat_us_) {
    next_beat_us_ = now_us + beat_us();
    stream_->send(BeatMessage{});
  }
}

// --- the connection ---

void RankMembership::connect() {
  const Result<comm::SocketAddress> address =
      comm::look_up_address(options_.coordinator_host, options_.coordinator_port);
  const Result<int> socket = address.ok() ? comm::start_connect(*address) : Result<int>(address.error());
  heard_us_ = clock_.now_us();
  if (!socket.ok()) {
    lose_link(fmt::format("{}: {}", coordinator_name(), socket.error().message));
    return;
  }
  stream_ = std::make_unique<MessageStream>(*socket, kMaxCoordinatorMessageBytes);
  link_ = Link::kConnecting;
}

void RankMembership::finish_connecting() {
  int fault = 0;
  socklen_t length = sizeof fault;
  CHECK_EQ(getsockopt(stream_->socket(), SOL_SOCKET, SO_ERROR, &fault, &length), 0);
  if (fault != 0) {
    lose_link(fmt::format("{}: {}", coordinator_name(), std::strerror(fault)));
    return;
  }
  link_ = Link::kJoined;
  heard_us_ = clock_.now_us();
  next_beat_us_ = heard_us_ + beat_us();
  stream_->send(JoinMessage{.rank = options_.rank.value,
                            .shape = options_.shape,
                            .incarnation = incarnation_,
                            .attempt = ++attempt_,
                            .pid = ::getpid(),
                            .node = options_.node,
                            .http_address = options_.http_address,
                            .rank_timeout_us = options_.rank_timeout_us,
                            .last_epoch = last_epoch_,
                            .facts = options_.facts,
                            .options = options_.options});
}

void RankMembership::lose_link(const std::string& why) {
  stream_.reset();
  link_ = Link::kNone;
  back_off();
  end_epoch(make_error(ErrorKind::kUnavailable, "{}", why));
}

void RankMembership::hear() {
  for (const Result<Message>& message : stream_->advance()) {
    heard_us_ = clock_.now_us();
    if (!message.ok()) {
      lose_link(fmt::format("{} is lost: {}", coordinator_name(), message.error().message));
      return;
    }
    const Status handled = handle(*message);
    if (!handled.ok()) lose_link(fmt::format("{} {}", coordinator_name(), handled.error().message));
    if (link_ != Link::kJoined) return;
  }
}

Status RankMembership::handle(const Message& message) {
  if (const RefusedMessage* const refused = std::get_if<RefusedMessage>(&message)) {
    stream_.reset();
    link_ = Link::kNone;
    back_off();
    // It tries again and again; a node without a front end has only this log.
    if (refused->why != logged_refusal_) {
      log_warning("group", "{} refuses rank {}: {}", coordinator_name(), options_.rank, refused->why);
      logged_refusal_ = refused->why;
    }
    end_epoch({refused->lasting ? ErrorKind::kInvalidArgument : ErrorKind::kUnavailable,
               fmt::format("{} refuses this rank: {}", coordinator_name(), refused->why), "", ""});
    return {};
  }
  if (const FormMessage* const form = std::get_if<FormMessage>(&message)) return handle_form(*form);
  if (const MapMessage* const map = std::get_if<MapMessage>(&message)) return handle_map(*map);
  if (const OpenMessage* const open = std::get_if<OpenMessage>(&message)) {
    handle_open(open->epoch);
    return {};
  }
  if (const EndedMessage* const ended = std::get_if<EndedMessage>(&message)) {
    handle_ended(*ended);
    return {};
  }
  if (const BeatMessage* const beat = std::get_if<BeatMessage>(&message)) {
    backoff_us_ = kMinBackoffUs;
    // While an epoch stands here the coordinator has nothing new to say, or will say it by a message of its own.
    if (!status().ok()) set_status(make_error(ErrorKind::kUnavailable, "{}", beat->text));
    return {};
  }
  return make_error(ErrorKind::kDataLoss, "sent a {} message", message_name(message));
}

// --- epochs ---

Status RankMembership::handle_form(const FormMessage& form) {
  const size_t rank = static_cast<size_t>(options_.rank.value);
  if (std::ssize(form.nodes) != options_.shape.size() || form.nodes[rank] != options_.node) {
    return make_error(ErrorKind::kDataLoss, "forms a group of {} ranks that is not this one", form.nodes.size());
  }
  parts_.reset();
  forming_ = form;
  last_epoch_ = std::max(last_epoch_, form.epoch.value);
  make_window();
  return {};
}

void RankMembership::make_window() {
  if (!forming_ || parts_ || engine_holds_epoch()) return;
  Result<std::unique_ptr<EpochMemory>> memory =
      EpochMemory::make(options_.rank, options_.shape.size(), options_.window_bytes, bell_region_);
  if (!memory.ok()) {
    fail_forming(memory.error(), options_.rank.value);
    return;
  }
  parts_.emplace();
  parts_->memory = std::move(*memory);
  WindowAddress address = parts_->memory->address();
  if (const std::vector<bool> remote = list_remote(); std::find(remote.begin(), remote.end(), true) != remote.end()) {
    if (const Status opened = open_port(); !opened.ok()) {
      fail_forming(opened.error(), options_.rank.value);
      return;
    }
    address.network = parts_->port->address();
  }
  stream_->send(WindowMessage{forming_->epoch, std::move(address)});
}

std::vector<bool> RankMembership::list_remote() const {
  std::vector<bool> remote;
  for (int32_t r = 0; r < options_.shape.size(); ++r) remote.push_back(is_remote(r));
  return remote;
}

Result<std::string> RankMembership::find_network_host() const {
  if (!options_.network_host.empty()) return options_.network_host;
  comm::SocketAddress local;
  local.length = sizeof local.storage;
  if (::getsockname(stream_->socket(), reinterpret_cast<sockaddr*>(&local.storage), &local.length) != 0) {
    return make_error(ErrorKind::kUnavailable, "the address of this machine: {}", std::strerror(errno));
  }
  const std::string text = local.to_string();  // "10.0.0.1:9000", "[::1]:9000"
  const std::string host = text.substr(0, text.rfind(':'));
  return host.starts_with('[') ? host.substr(1, host.size() - 2) : host;
}

Status RankMembership::open_port() {
  TANDEM_ASSIGN(const std::string host, find_network_host());
  std::byte* const region = parts_->memory->region();
  TANDEM_ASSIGN(parts_->port, NetworkPort::open({.host = host,
                                                 .rank = options_.rank,
                                                 .size = options_.shape.size(),
                                                 .region = region,
                                                 .window = MappedFabric::window_in(region, options_.shape.size(),
                                                                                   options_.window_bytes),
                                                 .bell = bell_region_.data(),
                                                 .rank_timeout_us = options_.rank_timeout_us,
                                                 .on_outcome = [this] { wake(); }}));
  return {};
}

Status RankMembership::handle_map(const MapMessage& map) {
  if (!forming_ || !parts_ || map.epoch != forming_->epoch) return {};
  if (std::ssize(map.windows) != options_.shape.size()) {
    return make_error(ErrorKind::kDataLoss, "sent {} windows instead of {}", map.windows.size(), options_.shape.size());
  }
  std::vector<NetworkPeer> peers;
  for (int32_t r = 0; r < options_.shape.size(); ++r) {
    if (RankId(r) == options_.rank) continue;
    const WindowAddress& window = map.windows[static_cast<size_t>(r)];
    if (is_remote(r)) {
      parts_->memory->stand_in(RankId(r));
      std::byte* const region = parts_->memory->ranks()[static_cast<size_t>(r)].region;
      peers.push_back({RankId(r), window.network, &MappedFabric::pulse_in(region)});
      continue;
    }
    if (const Status mapped = parts_->memory->map(RankId(r), window); !mapped.ok()) {
      fail_forming(mapped.error(), r);
      return {};
    }
  }
  const FabricLimits limits{.rank_timeout_us = options_.rank_timeout_us};
  if (peers.empty()) {
    parts_->fabric = std::make_unique<MappedFabric>(options_.rank, map.epoch, parts_->memory->ranks(),
                                                    options_.window_bytes, limits, clock_);
    stream_->send(MappedMessage{map.epoch});
    return {};
  }
  // The rest is check_network()'s, when the port has reached all.
  if (const Status connected = parts_->port->connect(std::move(peers)); !connected.ok()) {
    fail_forming(connected.error(), -1);
  }
  return {};
}

void RankMembership::check_network() {
  if (!parts_ || parts_->port == nullptr || parts_->fabric != nullptr) return;
  const std::optional<NetworkPort::Outcome> outcome = parts_->port->outcome();
  if (!outcome) return;
  if (outcome->error) {
    fail_forming(*outcome->error, outcome->suspect);
    return;
  }
  parts_->fabric = std::make_unique<NetworkFabric>(options_.rank, forming_->epoch, parts_->memory->ranks(), list_remote(),
                                                   options_.window_bytes,
                                                   FabricLimits{.rank_timeout_us = options_.rank_timeout_us}, clock_,
                                                   *parts_->port);
  stream_->send(MappedMessage{forming_->epoch});
}

void RankMembership::fail_forming(const Error& why, int32_t suspect) {
  stream_->send(FaultMessage{forming_->epoch, suspect, clip_text(why.message)});
  forming_.reset();
  parts_.reset();
}

void RankMembership::handle_open(Epoch epoch) {
  if (!forming_ || forming_->epoch != epoch || !parts_ || parts_->fabric == nullptr) return;
  log_info("group", "rank {}: epoch {} of {} ranks stands", options_.rank, epoch, options_.shape.size());
  forming_.reset();
  bool has_changed = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    CHECK(!current_.has_value());
    current_ = std::exchange(parts_, std::nullopt);
    engine_has_it_ = false;
    fault_.reset();
    has_changed = put_status(std::nullopt);
  }
  tell_status(has_changed);
}

void RankMembership::handle_ended(const EndedMessage& ended) {
  if (ended.fenced) {
    stream_.reset();
    link_ = Link::kNone;
    back_off();
  }
  end_epoch(make_error(ErrorKind::kUnavailable, "{}", ended.why));
}

void RankMembership::end_epoch(const Error& why) {
  forming_.reset();
  parts_.reset();
  std::optional<EpochParts> unused;
  bool has_changed = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    fault_.reset();
    has_changed = put_status(why);
    if (current_ && current_->fabric->status().ok()) {
      log_warning("group", "rank {}: epoch {} has ended: {}", options_.rank, current_->fabric->epoch(), why.message);
    }
    if (current_) current_->fabric->end(why);
    if (!engine_has_it_) unused = std::exchange(current_, std::nullopt);
  }
  tell_status(has_changed);
}

void RankMembership::send_faults() {
  std::optional<FaultMessage> fault;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    fault = std::exchange(fault_, std::nullopt);
  }
  if (!fault) return;
  if (link_ == Link::kJoined) stream_->send(*fault);
  end_epoch(make_error(ErrorKind::kUnavailable, "rank {} reports: {}", options_.rank, fault->why));
}

void RankMembership::set_status(std::optional<Error> error) {
  bool has_changed = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    has_changed = put_status(std::move(error));
  }
  tell_status(has_changed);
}

bool RankMembership::put_status(std::optional<Error> error) {
  const bool same = error_.has_value() == error.has_value() && (!error || error_->message == error->message);
  error_ = std::move(error);
  return !same;
}

void RankMembership::tell_status(bool has_changed) {
  if (!has_changed) return;
  bell_->ring();
  if (on_change_) on_change_();
}

}  // namespace

Result<std::unique_ptr<Membership>> Membership::start(const MembershipOptions& options,
                                                      std::function<void()> on_change) {
  const int64_t size = int64_t{options.shape.data} * options.shape.tensor;
  if (options.shape.data < 1 || options.shape.tensor < 1 || size > kMaxRanks) {
    return invalid_argument("--data-parallel-size", "a group of {} x {} ranks; 1 … {} are possible", options.shape.data,
                            options.shape.tensor, kMaxRanks);
  }
  if (options.rank.value < 0 || options.rank.value >= size) {
    return invalid_argument("--data-parallel-rank", "rank {} of a group of {}", options.rank, size);
  }
  if (options.rank_timeout_us < kMinRankTimeoutUs || options.rank_timeout_us > kMaxRankTimeoutUs) {
    return invalid_argument("--rank-timeout", "a rank time-out of {} us; {} … {} are possible", options.rank_timeout_us,
                            kMinRankTimeoutUs, kMaxRankTimeoutUs);
  }
  if (options.coordinator_port < 1 || options.coordinator_port > 65535) {
    return invalid_argument("--data-parallel-rpc-port", "port {} is not in 1 … 65535", options.coordinator_port);
  }
  CHECK_GE(options.window_bytes, 1);
  CHECK(!options.node.empty());
  CHECK_LE(std::ssize(options.node), kMaxNodeBytes);
  CHECK_LE(std::ssize(options.http_address), kMaxTextBytes);
  CHECK_LT(std::ssize(options.facts), kMaxFacts);  // one is added
  CHECK_LE(std::ssize(options.options), kMaxFacts);
  for (const std::vector<Fact>* const list : {&options.facts, &options.options}) {
    for (const Fact& fact : *list) {
      CHECK_LE(std::ssize(fact.name), kMaxFactBytes);
      CHECK_LE(std::ssize(fact.value), kMaxFactBytes);
    }
  }
  std::unique_ptr<RankMembership> membership = std::make_unique<RankMembership>(options, std::move(on_change));
  TANDEM_TRY(membership->start());
  return std::unique_ptr<Membership>(std::move(membership));
}

}  // namespace tandem::group
