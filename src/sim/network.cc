#include "src/sim/network.h"

#include <utility>

#include "src/sim/violation.h"

namespace tandem::sim {
namespace {

// Which message of transfer/wire.h this is: its type, counted from 0.
uint64_t type_of(const std::vector<std::byte>& message) {
  return message.size() > 3 ? static_cast<uint64_t>(message[3]) - 1 : 99;
}

Owner any_life_of(int node) { return {node, 0}; }

}  // namespace

class Network::Port final : public comm::Messenger {
 public:
  Port(Network& network, int node) : network_(network), node_(node) {}
  ~Port() override { network_.leave(node_); }

  int64_t port() const override { return kFirstPort + node_; }
  Result<comm::ConnectionId> connect(const std::string& host, int64_t port) override {
    const int64_t to = port - kFirstPort;
    if (to < 0 || to >= std::ssize(network_.handlers_)) {
      return make_error(ErrorKind::kUnavailable, "no route to {}:{}", host, port);
    }
    const comm::ConnectionId id(network_.next_id_++);
    network_.connect(id, node_, static_cast<int>(to));
    return id;
  }
  comm::SendResult send(comm::ConnectionId connection, std::span<const std::byte> message,
                        std::span<const std::byte> payload, uint64_t token) override {
    return network_.send(connection, message, payload, token);
  }
  void close(comm::ConnectionId connection) override { network_.close(connection); }
  std::string transport_name(comm::ConnectionId) const override { return "simulated"; }
  void poll(int64_t) override {}
  void wake() override {}

 private:
  Network& network_;
  int node_;
};

Network::Network(EventQueue& queue, Random& random, Trace& trace, int num_nodes)
    : queue_(queue), random_(random), trace_(trace), handlers_(static_cast<size_t>(num_nodes), nullptr) {}

std::unique_ptr<comm::Messenger> Network::listen(int node, comm::MessageHandler& handler) {
  CHECK(handlers_[static_cast<size_t>(node)] == nullptr);
  handlers_[static_cast<size_t>(node)] = &handler;
  return std::make_unique<Port>(*this, node);
}

Network::End* Network::find(comm::ConnectionId id) {
  const auto found = ends_.find(id);
  return found == ends_.end() ? nullptr : &found->second;
}

int64_t Network::num_ends(int node) const {
  int64_t count = 0;
  for (const auto& [id, end] : ends_) count += end.node == node && end.accepted ? 1 : 0;
  return count;
}

// ---- Time --------------------------------------------------------------------------------------------------------

int64_t Network::delay_us() {
  if (random_.chance(faults_.delay)) return random_.range(200, 200'000);
  return random_.range(10, 200);
}

int64_t Network::passable_at(int from, int to, int64_t at_us) const {
  const auto found = cut_until_us_.find({from, to});
  return found == cut_until_us_.end() ? at_us : std::max(at_us, found->second);
}

void Network::cut(int from, int to, int64_t duration_us) {
  int64_t& until_us = cut_until_us_[{from, to}];
  until_us = std::max(until_us, queue_.now_us() + duration_us);
  trace_.add(What::kCut, from, static_cast<uint64_t>(to), static_cast<uint64_t>(duration_us));
  if (duration_us <= kKeepaliveUs) return;
  queue_.add(queue_.now_us() + kKeepaliveUs, {}, [this, from, to] {
    if (passable_at(from, to, queue_.now_us()) <= queue_.now_us()) return;  // healed before
    std::vector<comm::ConnectionId> dead;
    for (const auto& [id, end] : ends_) {
      const End* other = find(end.other);
      if (other != nullptr && end.node == from && other->node == to) dead.push_back(id);
    }
    for (comm::ConnectionId id : dead) break_connection(id);
  });
}

void Network::heal() { cut_until_us_.clear(); }

// ---- Connections -------------------------------------------------------------------------------------------------

void Network::connect(comm::ConnectionId id, int from, int to) {
  const comm::ConnectionId theirs(next_id_++);
  End& mine = ends_[id];
  mine.node = from;
  mine.other = theirs;
  End& accepting = ends_[theirs];
  accepting.node = to;
  accepting.other = id;
  accepting.accepted = false;
  put(theirs, from, Packet{Kind::kAccept, {}, {}, {}, 0}, delay_us());
}

// The process is gone: its kernel closes what it had.
void Network::leave(int node) {
  handlers_[static_cast<size_t>(node)] = nullptr;
  std::vector<comm::ConnectionId> mine;
  for (const auto& [id, end] : ends_) {
    if (end.node == node && end.accepted) mine.push_back(id);
  }
  for (comm::ConnectionId id : mine) {
    const comm::ConnectionId other = ends_.at(id).other;
    ends_.erase(id);
    if (find(other) != nullptr) put(other, node, Packet{Kind::kClose, {}, {}, {}, 0}, random_.range(10'000, 50'000));
  }
}

void Network::close(comm::ConnectionId id) {
  const auto found = ends_.find(id);
  if (found == ends_.end()) return;
  End end = std::move(found->second);
  ends_.erase(found);
  give_back_payloads(id, end.node, std::move(end.leaving));
  if (find(end.other) != nullptr) put(end.other, end.node, Packet{Kind::kClose, {}, {}, {}, 0}, delay_us());
}

// on_sent follows for what was still queued, later.
void Network::give_back_payloads(comm::ConnectionId id, int node, std::deque<Packet>&& leaving) {
  const comm::MessageHandler* handler = handlers_[static_cast<size_t>(node)];
  for (const Packet& packet : leaving) {
    if (packet.token == 0) continue;
    queue_.add(queue_.now_us() + 1, any_life_of(node), [this, id, node, handler, token = packet.token] {
      comm::MessageHandler* now = handlers_[static_cast<size_t>(node)];
      if (now != nullptr && now == handler) now->on_sent(id, token);
    });
  }
}

// Both sides will hear of it, each in its time; what is on the way is lost.
void Network::break_connection(comm::ConnectionId id) {
  trace_.add(What::kBreak, Owner::kNobody, id.value);
  last_fault_us_ = queue_.now_us();
  const End* mine = find(id);
  if (mine == nullptr) return;
  for (const comm::ConnectionId side : {id, mine->other}) {
    End* end = find(side);
    if (end == nullptr || end->broken) continue;
    end->broken = true;
    end->arriving.clear();
    queue_.add(queue_.now_us() + random_.range(10, 50'000), any_life_of(end->node),
               [this, side] { tell_closed(side); });
  }
}

void Network::tell_closed(comm::ConnectionId id) {
  const auto found = ends_.find(id);
  if (found == ends_.end()) return;
  End end = std::move(found->second);
  ends_.erase(found);
  comm::MessageHandler* handler = handlers_[static_cast<size_t>(end.node)];
  if (!end.accepted || handler == nullptr) return;
  for (const Packet& packet : end.leaving) {
    if (packet.token != 0) handler->on_sent(id, packet.token);
  }
  trace_.add(What::kClosed, end.node, id.value);
  handler->on_closed(id, make_error(ErrorKind::kUnavailable, "the connection was lost"));
}

// ---- Messages ----------------------------------------------------------------------------------------------------

comm::SendResult Network::send(comm::ConnectionId id, std::span<const std::byte> message,
                               std::span<const std::byte> payload, uint64_t token) {
  End* end = find(id);
  if (end == nullptr || end->broken) return comm::SendResult::kClosed;
  if (std::ssize(end->leaving) >= comm::kMaxSendsPerConnection) {
    throw Violation("bounds",
                    fmt::format("node {} has {} unsent messages on one connection", end->node, end->leaving.size()));
  }
  Packet packet;
  packet.message.assign(message.begin(), message.end());
  const bool at_once = payload.empty() || random_.chance(0.5);
  if (at_once) {
    packet.payload.assign(payload.begin(), payload.end());
  } else {
    packet.source = payload;
    packet.token = token;
  }
  end->leaving.push_back(std::move(packet));
  kick(id);
  return at_once ? comm::SendResult::kSent : comm::SendResult::kPending;
}

// Puts on the way what the transport has; the next payload that it has not, it will take in a moment.
void Network::kick(comm::ConnectionId id) {
  End* end = find(id);
  if (end == nullptr || end->broken || end->taking) return;
  while (!end->leaving.empty() && end->leaving.front().token == 0) {
    Packet packet = std::move(end->leaving.front());
    end->leaving.pop_front();
    transmit(id, std::move(packet), true);
    end = find(id);
    if (end == nullptr || end->broken) return;
  }
  if (end->leaving.empty()) return;
  end->taking = true;
  queue_.add(queue_.now_us() + random_.range(1, 100), any_life_of(end->node), [this, id] { take_payload(id); });
}

void Network::take_payload(comm::ConnectionId id) {
  End* end = find(id);
  if (end == nullptr || end->broken) return;
  end->taking = false;
  Packet packet = std::move(end->leaving.front());
  end->leaving.pop_front();
  packet.payload.assign(packet.source.begin(), packet.source.end());
  packet.source = {};
  const uint64_t token = std::exchange(packet.token, 0);
  const int node = end->node;
  transmit(id, std::move(packet), true);
  handlers_[static_cast<size_t>(node)]->on_sent(id, token);
  kick(id);
}

void Network::transmit(comm::ConnectionId from, Packet packet, bool may_repeat) {
  const End& end = *find(from);
  const comm::ConnectionId to = end.other;
  if (find(to) == nullptr) return;
  const uint64_t type = type_of(packet.message);
  if (random_.chance(faults_.drop)) return break_connection(from);
  if (random_.chance(faults_.lose)) {
    last_fault_us_ = queue_.now_us();
    return trace_.add(What::kLose, end.node, to.value, type);
  }
  if (!packet.payload.empty() && random_.chance(faults_.damage)) {
    packet.payload[random_.below(packet.payload.size())] ^= static_cast<std::byte>(1U << random_.below(8));
    last_fault_us_ = queue_.now_us();
    trace_.add(What::kDamage, end.node, to.value, type);
  }
  if (may_repeat && random_.chance(faults_.duplicate)) {
    trace_.add(What::kDuplicate, end.node, to.value, type);
    queue_.add(queue_.now_us() + random_.range(1, 300'000), {}, [this, from, copy = packet] {
      const End* again = find(from);
      if (again != nullptr && !again->broken) transmit(from, copy, false);
    });
  }
  put(to, end.node, std::move(packet), delay_us());
}

void Network::put(comm::ConnectionId to, int from_node, Packet packet, int64_t delay) {
  End& end = *find(to);
  if (end.broken) return;
  end.last_arrival_us = std::max(end.last_arrival_us, queue_.now_us() + delay);
  end.arriving.push_back(std::move(packet));
  queue_.add(end.last_arrival_us, any_life_of(end.node), [this, to, from_node] { arrive(to, from_node); });
}

void Network::arrive(comm::ConnectionId to, int from_node) {
  End* end = find(to);
  if (end == nullptr || end->broken || end->arriving.empty()) return;
  const int64_t at_us = passable_at(from_node, end->node, queue_.now_us());
  if (at_us > queue_.now_us()) {
    // All that comes by this connection until then waits in the same order.
    end->last_arrival_us = std::max(end->last_arrival_us, at_us);
    queue_.add(at_us, any_life_of(end->node), [this, to, from_node] { arrive(to, from_node); });
    return;
  }
  const Packet packet = std::move(end->arriving.front());
  end->arriving.pop_front();
  comm::MessageHandler* handler = handlers_[static_cast<size_t>(end->node)];
  if (packet.kind == Kind::kClose) return tell_closed(to);
  if (packet.kind == Kind::kAccept) {
    if (handler == nullptr) return close(to);  // refused
    end->accepted = true;
    trace_.add(What::kAccept, end->node, to.value);
    return handler->on_accept(to);
  }
  if (!end->accepted || handler == nullptr) return;
  trace_.add(What::kMessage, end->node, to.value, type_of(packet.message));
  handler->on_message(to, packet.message, packet.payload);
}

}  // namespace tandem::sim
