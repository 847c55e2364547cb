// StreamMessenger, second half: how connections begin. Who connects speaks first; who accepts answers whether it can read
// the other's memory, and hears the same; then frames flow. A stranger costs a socket for a few seconds, no more.
#include <sys/epoll.h>
#include <unistd.h>

#include <cstring>

#include "src/base/log.h"
#include "src/comm/meeting.h"
#include "src/comm/stream_messenger.h"

namespace tandem::comm {
namespace {

constexpr int64_t kMeetingUs = 5'000'000;  // from a socket to exchanged greetings
constexpr size_t kKeyBytes = 16;           // of the name by which further streams find their connection
constexpr size_t kEarlyBytes = 2 * sizeof(uint32_t);  // magic and version

// The next greeting of a stream, once all of it is there. Strangers are told by its first bytes.
Result<std::optional<Greeting>> take_greeting(Stream& stream) {
  Greeting greeting;
  if (stream.unread_bytes() < kEarlyBytes) return std::optional<Greeting>();
  const std::span<const std::byte> bytes = stream.unread();
  std::memcpy(&greeting, bytes.data(), std::min(bytes.size(), sizeof greeting));
  if (bytes.size() < sizeof greeting) greeting.kind = GreetingKind::kFirst;  // not known yet
  TANDEM_TRY(check_greeting(greeting));
  if (bytes.size() < sizeof greeting) return std::optional<Greeting>();
  stream.consume(sizeof greeting);
  return std::optional<Greeting>(greeting);
}

}  // namespace

Result<ConnectionId> StreamMessenger::connect(const std::string& host, int64_t port) {
  if (port < 1 || port > 65535) return invalid_argument("remote_port", "port {} is not in 1 … 65535", port);
  if (host.empty() || host.size() > 253) return invalid_argument("remote_host", "a host name has 1 … 253 characters");
  if (std::ssize(links_) >= kMaxConnections) {
    return make_error(ErrorKind::kResourceExhausted, "all {} transfer connections are in use", kMaxConnections);
  }
  const std::optional<SocketAddress> address = parse_address(host, port);
  Link& link = add_link(address.has_value() ? address->to_string() : fmt::format("{}:{}", host, port));
  link.opened_here = true;
  // A look-up may take longer than a meeting; its own end is the resolver's.
  link.deadline_us = INT64_MAX;
  if (address.has_value()) {
    to_open_.emplace_back(link.id, *address);
  } else if (const Status started = look_ups_->start(link.id, host, port); !started.ok()) {
    links_.erase(link.id);
    return started.error();
  }
  return link.id;
}

StreamMessenger::Link& StreamMessenger::add_link(std::string peer) {
  std::unique_ptr<Link> link = std::make_unique<Link>();
  link->id = ConnectionId(next_id_++);
  link->peer = std::move(peer);
  link->deadline_us = clock_.now_us() + kMeetingUs;
  Link& added = *link;
  links_.emplace(added.id, std::move(link));
  return added;
}

Stream& StreamMessenger::add_stream(Link& link, std::unique_ptr<Stream> stream) {
  link.streams.push_back(std::move(stream));
  return *link.streams.back();
}

void StreamMessenger::open_new() {
  for (auto& [id, address] : look_ups_->take()) {
    Link* link = find(id);
    if (link == nullptr) continue;
    if (address.ok()) {
      to_open_.emplace_back(id, *address);
    } else {
      fail(*link, address.error());
    }
  }
  for (const auto& [id, address] : std::exchange(to_open_, {})) open_to(id, address);
}

void StreamMessenger::open_to(ConnectionId id, const SocketAddress& address) {
  Link* link = find(id);
  if (link == nullptr || link->is_dead()) return;
  link->address = address;
  link->deadline_us = clock_.now_us() + kMeetingUs;
  const Result<int> socket = start_connect(address);
  if (!socket.ok()) {
    return fail(*link,
                make_error(ErrorKind::kUnavailable, "cannot connect to {}: {}", link->peer, socket.error().message));
  }
  Stream& stream = add_stream(*link, std::make_unique<Stream>(*socket));
  const Greeting greeting = make_greeting(GreetingKind::kFirst);
  stream.add_raw(std::as_bytes(std::span(&greeting, 1)));
  watch(EPOLL_CTL_ADD, stream.socket(), kStreamEvent, link->id.value, 0, EPOLLIN);
  stream.interest = EPOLLIN;
  update_interest(*link);
}

Greeting StreamMessenger::make_greeting(GreetingKind kind) const {
  Greeting greeting;
  greeting.kind = kind;
  greeting.transport = options_.transport;
  if (!tickets_.has_value()) return greeting;
  set_text(greeting.boot_id, boot_id_);
  greeting.memory = make_offer(options_.memory.fd, options_.memory.bytes);
  greeting.tickets = make_offer(tickets_->address().fd, kTicketBytes);
  return greeting;
}

// Tries to map what the peer offers.
void StreamMessenger::map_memory(Link& link, const Greeting& greeting) {
  link.peer_transport = greeting.transport;
  if (options_.transport == Transport::kTcp || greeting.transport == Transport::kTcp) {
    link.no_sharing = "one side was told to use tcp";
    return;
  }
  if (!tickets_.has_value()) {
    link.no_sharing = "the memory here is not shareable";
    return;
  }
  Result<PeerMemory> memory = PeerMemory::open(greeting, boot_id_);
  if (memory.ok()) {
    link.peer_memory = std::move(memory).value();
  } else {
    link.no_sharing = memory.error().message;
  }
}

void StreamMessenger::accept_all() {
  while (true) {
    SocketAddress peer;
    const int socket = accept_connection(listener_, &peer);
    if (socket < 0) return;
    if (std::ssize(guests_) >= kMaxGuests) {
      log_warning("comm", "refused a connection from {}: {} others have not said what they want", peer.to_string(),
                  kMaxGuests);
      ::close(socket);
      continue;
    }
    const uint64_t id = next_id_++;
    guests_.emplace(id, Guest{std::make_unique<Stream>(socket), peer.to_string(), clock_.now_us() + kMeetingUs});
    watch(EPOLL_CTL_ADD, socket, kGuestEvent, id, 0, EPOLLIN);
  }
}

void StreamMessenger::read_guest(uint64_t id) {
  const auto found = guests_.find(id);
  if (found == guests_.end()) return;
  Stream& stream = *found->second.stream;
  const Result<bool> more = stream.read_some();
  const Result<std::optional<Greeting>> greeting = take_greeting(stream);
  if (!greeting.ok()) {
    log_warning("comm", "dropped a connection from {}: {}", found->second.peer, greeting.error().message);
    guests_.erase(found);
  } else if (greeting->has_value()) {
    welcome(id, **greeting);
  } else if (!more.ok()) {
    guests_.erase(found);
  }
}

void StreamMessenger::welcome(uint64_t guest_id, const Greeting& greeting) {
  Guest guest = std::move(guests_.at(guest_id));
  guests_.erase(guest_id);
  if (greeting.kind == GreetingKind::kJoin) {
    for (auto& [id, link] : links_) {
      if (link->opened_here || link->is_dead() || link->key.empty() || link->key != text_of(greeting.key)) continue;
      if (link->streams.size() >= kStreams) break;
      Stream& stream = add_stream(*link, std::move(guest.stream));
      watch(EPOLL_CTL_MOD, stream.socket(), kStreamEvent, link->id.value, link->streams.size() - 1, EPOLLIN);
      stream.interest = EPOLLIN;
      if (link->is_open) read_stream(*link, stream);  // frames may have come with the greeting
      return;
    }
    log_warning("comm", "dropped a stream from {}: it belongs to no connection", guest.peer);
    return;
  }
  if (greeting.kind != GreetingKind::kFirst) return;
  if (std::ssize(links_) >= kMaxConnections) {
    log_warning("comm", "refused a connection from {}: all {} are in use", guest.peer, kMaxConnections);
    return;
  }
  Link& link = add_link(guest.peer);
  link.key = random_hex(kKeyBytes);
  Stream& stream = add_stream(link, std::move(guest.stream));
  watch(EPOLL_CTL_MOD, stream.socket(), kStreamEvent, link.id.value, 0, EPOLLIN);
  stream.interest = EPOLLIN;
  map_memory(link, greeting);
  Greeting answer = make_greeting(GreetingKind::kAnswer);
  answer.can_read = link.peer_memory.has_value() ? 1 : 0;
  set_text(answer.key, link.key);
  set_text(answer.reason, link.no_sharing);
  stream.add_raw(std::as_bytes(std::span(&answer, 1)));
  handler_.on_accept(link.id);
}

// The answer for who connected, whether it could map our memory for who accepted.
void StreamMessenger::read_greeting(Link& link) {
  const Result<std::optional<Greeting>> greeting = take_greeting(*link.streams[0]);
  if (!greeting.ok()) {
    return fail(link, make_error(ErrorKind::kUnavailable, "cannot connect to {}: {}", link.peer,
                                 greeting.error().message));
  }
  if (!greeting->has_value()) return;
  const GreetingKind wanted = link.opened_here ? GreetingKind::kAnswer : GreetingKind::kMapped;
  if ((*greeting)->kind != wanted) {
    return fail(link, make_error(ErrorKind::kUnavailable, "{} greeted in the wrong order", link.peer));
  }
  link.is_read = (*greeting)->can_read != 0 && tickets_.has_value();
  if (link.opened_here) {
    map_memory(link, **greeting);
    link.key = text_of((*greeting)->key);
    Greeting mapped = make_greeting(GreetingKind::kMapped);
    mapped.can_read = link.peer_memory.has_value() ? 1 : 0;
    set_text(mapped.reason, link.no_sharing);
    link.streams[0]->add_raw(std::as_bytes(std::span(&mapped, 1)));
  }
  if (!link.is_read && link.no_sharing.empty()) link.no_sharing = text_of((*greeting)->reason);
  open_link(link);
}

void StreamMessenger::open_link(Link& link) {
  const bool must_share =
      options_.transport == Transport::kSharedMemory || link.peer_transport == Transport::kSharedMemory;
  if (must_share && !link.shares()) {
    return fail(link, make_error(ErrorKind::kUnavailable,
                                 "no shared memory with {}: {}; --kv-transport auto takes TCP instead", link.peer,
                                 link.no_sharing));
  }
  link.is_open = true;
  if (!link.shares() && options_.transport != Transport::kTcp) {
    log_info("comm", "no shared memory with {}: {}; its payloads go over TCP", link.peer, link.no_sharing);
  }
  for (size_t i = 1; link.opened_here && !link.shares() && i < kStreams; ++i) {
    const Result<int> socket = start_connect(link.address);
    if (!socket.ok()) {
      return fail(link, make_error(ErrorKind::kUnavailable, "cannot connect to {}: {}", link.peer,
                                   socket.error().message));
    }
    Stream& stream = add_stream(link, std::make_unique<Stream>(*socket));
    Greeting join = make_greeting(GreetingKind::kJoin);
    set_text(join.key, link.key);
    stream.add_raw(std::as_bytes(std::span(&join, 1)));
    watch(EPOLL_CTL_ADD, stream.socket(), kStreamEvent, link.id.value, i, EPOLLIN);
    stream.interest = EPOLLIN;
  }
  for (const Waiting& waiting : std::exchange(link.waiting, {})) {
    enqueue(link, waiting.message, waiting.pieces, waiting.token);
  }
}

void StreamMessenger::end_late() {
  const int64_t now_us = clock_.now_us();
  for (auto& [id, link] : links_) {
    if (link->is_open || link->is_dead() || now_us < link->deadline_us) continue;
    fail(*link, make_error(ErrorKind::kUnavailable, "{} did not answer within {} s", link->peer, kMeetingUs / 1'000'000));
  }
  std::erase_if(guests_, [now_us](const auto& entry) { return now_us >= entry.second.deadline_us; });
}

}  // namespace tandem::comm
