#include "src/group/network_port.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>

#include "src/base/clock.h"
#include "src/comm/address.h"
#include "src/comm/ucx_settings.h"
#include "src/group/mapped_fabric.h"
#include "src/group/messages.h"

namespace tandem::group {
namespace {

// Kinds of messages beside the channels.
constexpr int32_t kPulse = kNumChannels;
constexpr int32_t kData = kNumChannels + 1;

constexpr unsigned kMessageId = 1;         // the one active-message id

// What one message gathers: enough that its own cost does not matter, and no more than UCX sends without cutting it.
constexpr size_t kMaxGatheredBytes = 120 * 1024;
constexpr size_t kMaxGathered = 128;  // places

constexpr int kMostRounds = 64;            // of progress under one lock, so that the engine gets its turn
constexpr int kMaxFruitlessRounds = 64;    // of work inside UCX that leads to no event …
constexpr int64_t kMinBackoffUs = 50;      // … then pauses of this length, doubling up to
constexpr int64_t kMaxBackoffUs = 1000;    // this
constexpr int64_t kIdleUs = 60'000'000;    // longest sleep
constexpr int64_t kLostFraction = 5;       // of the rank time-out until a lost peer is told
constexpr int64_t kConnectTimeouts = 2;

std::string to_hex(std::span<const std::byte> bytes) {
  std::string text;
  for (const std::byte byte : bytes) text += fmt::format("{:02x}", static_cast<int>(byte));
  return text;
}

std::optional<std::vector<std::byte>> from_hex(std::string_view text) {
  std::vector<std::byte> bytes;
  if (text.empty() || text.size() % 2 != 0) return std::nullopt;
  for (size_t i = 0; i < text.size(); i += 2) {
    unsigned value = 0;
    const auto [end, fault] = std::from_chars(text.data() + i, text.data() + i + 2, value, 16);
    if (fault != std::errc() || end != text.data() + i + 2) return std::nullopt;
    bytes.push_back(static_cast<std::byte>(value));
  }
  return bytes;
}

// "WORKER:STAMP", both in hex.
struct PortAddress {
  std::vector<std::byte> worker;
  uint64_t stamp = 0;

  std::string to_text() const { return fmt::format("{}:{:x}", to_hex(worker), stamp); }
  static std::optional<PortAddress> parse(std::string_view text) {
    const size_t colon = text.find(':');
    if (colon == std::string_view::npos) return std::nullopt;
    std::optional<std::vector<std::byte>> worker = from_hex(text.substr(0, colon));
    const std::string_view number = text.substr(colon + 1);
    PortAddress address;
    const auto [end, fault] = std::from_chars(number.data(), number.data() + number.size(), address.stamp, 16);
    if (!worker || fault != std::errc() || end != number.data() + number.size()) return std::nullopt;
    address.worker = *std::move(worker);
    return address;
  }
};

// Before every message. Behind it a Place for each piece of data, which follow one another in the message.
struct Header {
  uint64_t stamp = 0;  // of the receiving port: who has it belongs to this epoch
  uint64_t value = 0;  // of a counter, which is set when the data is in place
  int32_t from = 0;
  int32_t kind = 0;  // a channel, kPulse or kData
};
// In the receiver's window.
struct Place {
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

class UcxPort;

struct Peer {
  UcxPort* owner = nullptr;
  RankId rank;
  std::atomic<uint64_t>* pulse = nullptr;
  ucp_ep_h endpoint = nullptr;
  uint64_t stamp = 0;  // of its port
  int64_t unsent = 0;  // messages that UCX has not finished
  std::optional<ucs_status_t> lost;
  // Gathered by put(); the engine thread's.
  std::vector<Place> places;
  std::vector<ucp_dt_iov_t> data;
  size_t gathered_bytes = 0;
};

// A message on its way out. Its data lies with the engine.
struct Outgoing {
  Peer* peer = nullptr;
  std::vector<std::byte> header;
  std::vector<ucp_dt_iov_t> data;
};

class UcxPort final : public NetworkPort {
 public:
  explicit UcxPort(const NetworkPortOptions& options) : options_(options), bell_(options.bell) {}
  ~UcxPort() override;

  Status start();
  std::string address() const override { return address_; }
  Status connect(std::vector<NetworkPeer> peers) override;
  std::optional<Outcome> outcome() const override;
  void set_on_lost(std::function<void(const Error&)> on_lost) override;
  void put(RankId to, int64_t region_offset, std::span<const std::byte> data) override;
  void signal(RankId to, Channel channel, uint64_t value) override;
  void push() override;
  void send_pulse() override;
  std::optional<RankId> unsent_to() const override;
  void abandon() override;

  // Called back by UCX, under the lock.
  ucs_status_t on_arrival(std::span<const std::byte> header, std::span<const std::byte> data);
  void on_sent(Outgoing* message);
  void on_endpoint_error(Peer& peer, ucs_status_t status);

 private:
  void run();
  bool work();
  void settle(int64_t now_us);
  void send(Peer& peer, const Header& header, std::span<const Place> places, std::vector<ucp_dt_iov_t> data);
  void send_pulse_to(Peer& peer) { send(peer, {peer.stamp, 0, options_.rank.value, kPulse}, {}, {}); }
  void send_gathered(Peer& peer, int32_t kind, uint64_t value = 0);
  void take_data(std::span<const std::byte> places, std::span<const std::byte> data);
  void close_endpoints();
  Peer* find_peer(RankId rank);
  void wake() { eventfd_write(wake_fd_, 1); }
  static Error make_lost(const Peer& peer) {
    return make_error(ErrorKind::kUnavailable, "the network connection to rank {} is lost: {}", peer.rank,
                      ucs_status_string(*peer.lost));
  }

  NetworkPortOptions options_;
  comm::Bell bell_;
  SteadyClock clock_;
  std::string address_;
  int wake_fd_ = -1;
  int epoll_fd_ = -1;
  const uint64_t stamp_ = random_u64();
  std::thread thread_;
  std::atomic<bool> stops_ = false;

  mutable std::mutex mutex_;  // of all below; UCX is called under it
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<Peer*> peer_of_rank_;
  std::vector<bool> has_spoken_;  // by rank; some speak before connect()
  std::unordered_map<Outgoing*, std::unique_ptr<Outgoing>> in_flight_;
  uint64_t num_arrived_ = 0;
  bool connects_ = false;
  bool closing_ = false;
  int64_t connect_deadline_us_ = 0;
  std::optional<Outcome> outcome_;
  std::optional<Error> lost_;
  int64_t lost_us_ = 0;
  std::function<void(const Error&)> on_lost_;
};

// --- start and stop ---

Status UcxPort::start() {
  TANDEM_ASSIGN(const comm::SocketAddress host, comm::look_up_address(options_.host, 0));
  TANDEM_ASSIGN(const std::string device, comm::find_device(host));
  TANDEM_ASSIGN(context_, comm::make_ucx_context(device, /*shared_memory=*/false));
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  const ucs_status_t status = ucp_worker_create(context_, &params, &worker_);
  if (status != UCS_OK) {
    worker_ = nullptr;
    return make_error(ErrorKind::kUnavailable, "UCX cannot open {} ({}); is the limit of open files too low?", device,
                      ucs_status_string(status));
  }
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kMessageId;
  handler.cb = [](void* argument, const void* header, size_t header_bytes, void* data, size_t bytes,
                  const ucp_am_recv_param_t* param) {
    // A rendezvous is nothing that a port would offer.
    if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) return UCS_OK;
    return static_cast<UcxPort*>(argument)->on_arrival({static_cast<const std::byte*>(header), header_bytes},
                                                       {static_cast<const std::byte*>(data), bytes});
  };
  handler.arg = this;
  CHECK_EQ(static_cast<int>(ucp_worker_set_am_recv_handler(worker_, &handler)), static_cast<int>(UCS_OK));
  has_spoken_.resize(static_cast<size_t>(options_.size), false);
  peer_of_rank_.resize(static_cast<size_t>(options_.size), nullptr);
  PortAddress mine;
  mine.stamp = stamp_;
  ucp_address_t* address = nullptr;
  size_t length = 0;
  CHECK_EQ(static_cast<int>(ucp_worker_get_address(worker_, &address, &length)), static_cast<int>(UCS_OK));
  const std::byte* const bytes = reinterpret_cast<const std::byte*>(address);
  mine.worker.assign(bytes, bytes + length);
  ucp_worker_release_address(worker_, address);
  address_ = mine.to_text();
  CHECK_LE(std::ssize(address_), kMaxNetworkBytes);
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  CHECK_GE(wake_fd_, 0);
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  CHECK_GE(epoll_fd_, 0);
  int worker_fd = -1;
  CHECK_EQ(static_cast<int>(ucp_worker_get_efd(worker_, &worker_fd)), static_cast<int>(UCS_OK));
  for (const int fd : {wake_fd_, worker_fd}) {
    epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
    CHECK_EQ(epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event), 0);
  }
  thread_ = std::thread([this] { run(); });
  return {};
}

UcxPort::~UcxPort() {
  stops_ = true;
  if (thread_.joinable()) {
    wake();
    thread_.join();
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    close_endpoints();
    if (worker_ != nullptr) ucp_worker_destroy(worker_);
    if (context_ != nullptr) ucp_cleanup(context_);
  }
  if (wake_fd_ >= 0) ::close(wake_fd_);
  if (epoll_fd_ >= 0) ::close(epoll_fd_);
}

void UcxPort::close_endpoints() {
  closing_ = true;
  std::vector<ucs_status_ptr_t> closings;
  for (const std::unique_ptr<Peer>& peer : peers_) {
    if (peer->endpoint == nullptr) continue;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    const ucs_status_ptr_t closing = ucp_ep_close_nbx(std::exchange(peer->endpoint, nullptr), &param);
    if (UCS_PTR_IS_PTR(closing)) closings.push_back(closing);
  }
  const int64_t deadline_us = clock_.now_us() + kCloseUs;
  for (const ucs_status_ptr_t closing : closings) {
    while (ucp_request_check_status(closing) == UCS_INPROGRESS && clock_.now_us() < deadline_us) {
      ucp_worker_progress(worker_);
    }
    ucp_request_free(closing);
  }
}

// --- connecting ---

Status UcxPort::connect(std::vector<NetworkPeer> peers) {
  const std::lock_guard<std::mutex> lock(mutex_);
  CHECK(!connects_);
  connects_ = true;
  connect_deadline_us_ = clock_.now_us() + kConnectTimeouts * options_.rank_timeout_us;
  for (const NetworkPeer& each : peers) {
    const std::optional<PortAddress> address = PortAddress::parse(each.address);
    if (!address) {
      return make_error(ErrorKind::kDataLoss, "rank {} has no network address but \"{}\"", each.rank, each.address);
    }
    peers_.push_back(std::make_unique<Peer>());
    Peer& peer = *peers_.back();
    peer.owner = this;
    peer.rank = each.rank;
    peer.pulse = each.pulse;
    peer.stamp = address->stamp;
    ucp_ep_params_t params{};
    params.field_mask =
        UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(address->worker.data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = [](void* argument, ucp_ep_h, ucs_status_t status) {
      Peer& failed = *static_cast<Peer*>(argument);
      failed.owner->on_endpoint_error(failed, status);
    };
    params.err_handler.arg = &peer;
    const ucs_status_t status = ucp_ep_create(worker_, &params, &peer.endpoint);
    if (status != UCS_OK) {
      peer.endpoint = nullptr;
      return make_error(ErrorKind::kUnavailable, "no network of this rank reaches rank {}: {}", each.rank,
                        ucs_status_string(status));
    }
    peer_of_rank_[static_cast<size_t>(each.rank.value)] = &peer;
  }
  for (const std::unique_ptr<Peer>& peer : peers_) send_pulse_to(*peer);
  wake();
  return {};
}

std::optional<NetworkPort::Outcome> UcxPort::outcome() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return outcome_;
}

void UcxPort::set_on_lost(std::function<void(const Error&)> on_lost) {
  const std::lock_guard<std::mutex> lock(mutex_);
  on_lost_ = std::move(on_lost);
}

void UcxPort::on_endpoint_error(Peer& peer, ucs_status_t status) {
  if (closing_ || peer.lost) return;
  peer.lost = status;
  if (lost_) return;
  lost_ = make_lost(peer);
  lost_us_ = clock_.now_us();
}

// --- writing ---

Peer* UcxPort::find_peer(RankId rank) {
  Peer* const peer = peer_of_rank_[static_cast<size_t>(rank.value)];
  CHECK(peer != nullptr);
  return peer;
}

void UcxPort::put(RankId to, int64_t offset, std::span<const std::byte> data) {
  Peer& peer = *find_peer(to);
  while (!data.empty()) {
    if (peer.gathered_bytes >= kMaxGatheredBytes || peer.places.size() >= kMaxGathered) {
      const std::lock_guard<std::mutex> lock(mutex_);
      send_gathered(peer, kData);
    }
    const std::span<const std::byte> part =
        data.first(std::min(kMaxGatheredBytes - peer.gathered_bytes, data.size()));
    peer.places.push_back({static_cast<uint64_t>(offset), part.size()});
    peer.data.push_back({const_cast<std::byte*>(part.data()), part.size()});  // UCX only reads it
    peer.gathered_bytes += part.size();
    offset += std::ssize(part);
    data = data.subspan(part.size());
  }
}

void UcxPort::signal(RankId to, Channel channel, uint64_t value) {
  const std::lock_guard<std::mutex> lock(mutex_);
  send_gathered(*find_peer(to), static_cast<int32_t>(channel), value);
}

void UcxPort::push() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const std::unique_ptr<Peer>& peer : peers_) {
    if (!peer->places.empty()) send_gathered(*peer, kData);
  }
}

void UcxPort::send_pulse() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const std::unique_ptr<Peer>& peer : peers_) send_pulse_to(*peer);
}

void UcxPort::send_gathered(Peer& peer, int32_t kind, uint64_t value) {
  const std::vector<Place> places = std::exchange(peer.places, {});
  std::vector<ucp_dt_iov_t> data = std::exchange(peer.data, {});
  peer.gathered_bytes = 0;
  send(peer, {peer.stamp, value, options_.rank.value, kind}, places, std::move(data));
}

void UcxPort::send(Peer& peer, const Header& header, std::span<const Place> places, std::vector<ucp_dt_iov_t> data) {
  if (closing_ || peer.lost) return;
  std::unique_ptr<Outgoing> message = std::make_unique<Outgoing>();
  message->peer = &peer;
  message->header.resize(sizeof header + places.size_bytes());
  std::memcpy(message->header.data(), &header, sizeof header);
  if (!places.empty()) std::memcpy(message->header.data() + sizeof header, places.data(), places.size_bytes());
  message->data = std::move(data);
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  param.user_data = message.get();
  param.cb.send = [](void* request, ucs_status_t, void* user_data) {
    ucp_request_free(request);
    Outgoing* const sent = static_cast<Outgoing*>(user_data);
    sent->peer->owner->on_sent(sent);
  };
  const void* buffer = nullptr;
  size_t count = 0;
  if (message->data.size() > 1) {  // UCX takes no empty list
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_DATATYPE;
    param.datatype = UCP_DATATYPE_IOV;
    buffer = message->data.data();
    count = message->data.size();
  } else if (!message->data.empty()) {
    buffer = message->data.front().buffer;
    count = message->data.front().length;
  }
  const ucs_status_ptr_t result = ucp_am_send_nbx(peer.endpoint, kMessageId, message->header.data(),
                                                  message->header.size(), buffer, count, &param);
  if (UCS_PTR_IS_ERR(result)) {
    on_endpoint_error(peer, UCS_PTR_STATUS(result));
  } else if (UCS_PTR_IS_PTR(result)) {
    ++peer.unsent;
    Outgoing* const key = message.get();
    in_flight_.emplace(key, std::move(message));
    wake();
  }
}

void UcxPort::on_sent(Outgoing* message) {
  if (--message->peer->unsent == 0) bell_.ring();
  in_flight_.erase(message);
}

// --- reading ---

ucs_status_t UcxPort::on_arrival(std::span<const std::byte> bytes, std::span<const std::byte> data) {
  Header header;
  if (bytes.size() < sizeof header) return UCS_OK;
  std::memcpy(&header, bytes.data(), sizeof header);
  // Of another epoch, or a stranger's: dropped.
  if (header.stamp != stamp_ || header.from < 0 || header.from >= options_.size) return UCS_OK;
  ++num_arrived_;
  has_spoken_[static_cast<size_t>(header.from)] = true;
  if (Peer* const peer = peer_of_rank_[static_cast<size_t>(header.from)]; peer != nullptr) {
    peer->pulse->fetch_add(1, std::memory_order_relaxed);  // everything is a sign of life
  }
  take_data(bytes.subspan(sizeof header), data);
  if (header.kind >= 0 && header.kind < kNumChannels) {
    MappedFabric::counter_in(options_.region, RankId(header.from), static_cast<Channel>(header.kind))
        .store(header.value, std::memory_order_release);
    bell_.ring();
  }
  return UCS_OK;
}

// `places`: as many Places as there are, of `data` one after the other. What no port of this kind sends is dropped.
void UcxPort::take_data(std::span<const std::byte> places, std::span<const std::byte> data) {
  const uint64_t window_bytes = options_.window.size();
  for (; places.size() >= sizeof(Place); places = places.subspan(sizeof(Place))) {
    Place place;
    std::memcpy(&place, places.data(), sizeof place);
    if (place.bytes > data.size() || place.offset > window_bytes || place.bytes > window_bytes - place.offset) return;
    std::memcpy(options_.window.data() + place.offset, data.data(), place.bytes);
    data = data.subspan(place.bytes);
  }
}

std::optional<RankId> UcxPort::unsent_to() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const std::unique_ptr<Peer>& peer : peers_) {
    if (peer->unsent > 0 && !closing_) return peer->rank;
  }
  return std::nullopt;
}

void UcxPort::abandon() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const std::unique_ptr<Peer>& peer : peers_) {
    peer->places.clear();
    peer->data.clear();
    peer->gathered_bytes = 0;
  }
  if (!in_flight_.empty() && !closing_) close_endpoints();
}

// --- the thread ---

void UcxPort::run() {
  int fruitless_rounds = 0;
  int64_t backoff_us = kMinBackoffUs;
  while (!stops_) {
    bool may_sleep = false;
    int64_t timeout_us = kIdleUs;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const bool worked = work();
      if (worked) {
        fruitless_rounds = 0;
        backoff_us = kMinBackoffUs;
      }
      const int64_t now_us = clock_.now_us();
      settle(now_us);
      if (connects_ && !outcome_) timeout_us = std::max<int64_t>(0, connect_deadline_us_ - now_us);
      if (lost_ && on_lost_) {
        timeout_us = std::clamp<int64_t>(lost_us_ + options_.rank_timeout_us / kLostFraction - now_us, 0, timeout_us);
      }
      may_sleep = !worked && ucp_worker_arm(worker_) == UCS_OK;
      // UCX has something in hand that no event will tell of.
      if (!worked && !may_sleep && ++fruitless_rounds >= kMaxFruitlessRounds) {
        may_sleep = true;
        timeout_us = std::min(timeout_us, backoff_us);
        backoff_us = std::min(2 * backoff_us, kMaxBackoffUs);
      }
    }
    if (!may_sleep || stops_) continue;
    epoll_event event{};
    const timespec limit{timeout_us / 1'000'000, timeout_us % 1'000'000 * 1000};
    epoll_pwait2(epoll_fd_, &event, 1, &limit, nullptr);
    eventfd_t ignored = 0;
    eventfd_read(wake_fd_, &ignored);
  }
}

// Whether anything came in or went out.
bool UcxPort::work() {
  const uint64_t arrived = num_arrived_;
  const size_t in_flight = in_flight_.size();
  for (int round = 0; round < kMostRounds && ucp_worker_progress(worker_) != 0; ++round) {
  }
  return num_arrived_ != arrived || in_flight_.size() != in_flight;
}

// Tells what has come of connecting, and of a lost peer.
void UcxPort::settle(int64_t now_us) {
  if (connects_ && !outcome_) {
    const auto find = [this](auto&& holds) {
      const auto found = std::find_if(peers_.begin(), peers_.end(), [&](const auto& peer) { return holds(*peer); });
      return found == peers_.end() ? nullptr : found->get();
    };
    const Peer* const lost = find([](const Peer& peer) { return peer.lost.has_value(); });
    const Peer* const silent = find([this](const Peer& peer) { return peer.unsent > 0 || !has_spoken_[static_cast<size_t>(peer.rank.value)]; });
    if (lost != nullptr) {
      outcome_ = Outcome{make_lost(*lost), lost->rank.value};
    } else if (silent == nullptr) {
      outcome_.emplace();
    } else if (now_us >= connect_deadline_us_) {
      outcome_ = Outcome{make_error(ErrorKind::kUnavailable, "nothing came from rank {} through the network at {}",
                                    silent->rank, options_.host),
                         silent->rank.value};
    }
    if (outcome_) options_.on_outcome();
  }
  if (lost_ && on_lost_ && now_us >= lost_us_ + options_.rank_timeout_us / kLostFraction) {
    std::exchange(on_lost_, nullptr)(*lost_);
  }
}

}  // namespace

Result<std::unique_ptr<NetworkPort>> NetworkPort::open(const NetworkPortOptions& options) {
  std::unique_ptr<UcxPort> port = std::make_unique<UcxPort>(options);
  TANDEM_TRY(port->start());
  return std::unique_ptr<NetworkPort>(std::move(port));
}

}  // namespace tandem::group
