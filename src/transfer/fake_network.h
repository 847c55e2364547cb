// A network in memory for tests: nodes are ports, nothing moves until step() is called, and every choice is a random
// one of the given generator. It may reorder, repeat, drop and damage messages and cut connections.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "src/comm/messenger.h"

namespace tandem::transfer {

struct NetworkFaults {
  double reorder = 0;  // chance that a later message overtakes
  double repeat = 0;   // of messages without payload and with
  double drop = 0;
  double damage = 0;  // one bit of a payload
};

class FakeNetwork {
 public:
  class Node;

  FakeNetwork(std::mt19937_64& random, const NetworkFaults& faults) : random_(random), faults_(faults) {}

  // A node that listens on `port`; the former one of that port must be gone.
  std::unique_ptr<Node> add_node(int64_t port, comm::MessageHandler& handler);
  // One thing happens; false if nothing can.
  bool step();
  // From now on who connects to `port` comes to the node of `target`; connections that stand stay where they are.
  void redirect(int64_t port, int64_t target) { redirected_[port] = target; }
  // Both sides of a random connection will hear that it is lost.
  void cut_one();
  int64_t num_connections() const { return std::ssize(ends_); }

 private:
  struct Packet {
    std::vector<std::byte> message;
    std::vector<std::byte> payload;
    std::span<const std::byte> source;  // not taken yet: still the sender's memory
    uint64_t token = 0;
  };
  // One side of a connection.
  struct End {
    int64_t port = 0;
    comm::ConnectionId other;
    std::vector<Packet> outgoing;
    bool told_accept = true;  // false: on_accept is still to come
    bool lost = false;        // on_closed is still to come
    bool closed_by_owner = false;
  };

  bool chance(double probability) { return std::uniform_real_distribution<>(0, 1)(random_) < probability; }
  void release(comm::ConnectionId id, End& end, bool tell);
  void finish(comm::ConnectionId id);
  void deliver(comm::ConnectionId from, size_t index);

  std::mt19937_64& random_;
  NetworkFaults faults_;
  std::map<int64_t, comm::MessageHandler*> listeners_;
  std::map<int64_t, int64_t> redirected_;
  std::map<comm::ConnectionId, End> ends_;
  uint64_t next_id_ = 1;
};

class FakeNetwork::Node final : public comm::Messenger {
 public:
  Node(FakeNetwork& network, int64_t port) : network_(network), port_(port) {}
  ~Node() override;

  int64_t port() const override { return port_; }
  Result<comm::ConnectionId> connect(const std::string& host, int64_t port) override;
  comm::SendResult send(comm::ConnectionId connection, std::span<const std::byte> message,
                        std::span<const std::byte> payload, uint64_t token) override;
  void close(comm::ConnectionId connection) override;
  std::string transport_name(comm::ConnectionId) const override { return "fake"; }
  void poll(int64_t) override {}
  void wake() override {}

 private:
  FakeNetwork& network_;
  int64_t port_;
};

inline std::unique_ptr<FakeNetwork::Node> FakeNetwork::add_node(int64_t port, comm::MessageHandler& handler) {
  CHECK(listeners_.emplace(port, &handler).second);
  return std::make_unique<Node>(*this, port);
}

inline FakeNetwork::Node::~Node() {
  network_.listeners_.erase(port_);
  std::vector<comm::ConnectionId> mine;
  for (const auto& [id, end] : network_.ends_) {
    if (end.port == port_) mine.push_back(id);
  }
  for (comm::ConnectionId id : mine) {
    const auto other = network_.ends_.find(network_.ends_.at(id).other);
    if (other != network_.ends_.end()) other->second.lost = true;
    network_.ends_.erase(id);
  }
}

inline Result<comm::ConnectionId> FakeNetwork::Node::connect(const std::string&, int64_t port) {
  const auto redirected = network_.redirected_.find(port);
  if (redirected != network_.redirected_.end()) port = redirected->second;
  const comm::ConnectionId mine(network_.next_id_++);
  const comm::ConnectionId theirs(network_.next_id_++);
  End& end = network_.ends_[mine];
  end.port = port_;
  end.other = theirs;
  if (!network_.listeners_.contains(port)) {
    end.lost = true;
    return mine;
  }
  End& accepted = network_.ends_[theirs];
  accepted.port = port;
  accepted.other = mine;
  accepted.told_accept = false;
  return mine;
}

inline comm::SendResult FakeNetwork::Node::send(comm::ConnectionId connection, std::span<const std::byte> message,
                                                std::span<const std::byte> payload, uint64_t token) {
  const auto found = network_.ends_.find(connection);
  if (found == network_.ends_.end() || found->second.lost || found->second.closed_by_owner) {
    return comm::SendResult::kClosed;
  }
  Packet packet;
  packet.message.assign(message.begin(), message.end());
  const bool at_once = payload.empty() || network_.chance(0.5);
  if (at_once) {
    packet.payload.assign(payload.begin(), payload.end());
  } else {
    packet.source = payload;
    packet.token = token;
  }
  found->second.outgoing.push_back(std::move(packet));
  return at_once ? comm::SendResult::kSent : comm::SendResult::kPending;
}

inline void FakeNetwork::Node::close(comm::ConnectionId connection) {
  const auto found = network_.ends_.find(connection);
  if (found != network_.ends_.end()) found->second.closed_by_owner = true;
}

// Gives the payloads that were not sent back to their owner.
inline void FakeNetwork::release(comm::ConnectionId id, End& end, bool tell) {
  std::vector<uint64_t> tokens;
  for (const Packet& packet : end.outgoing) {
    if (packet.token != 0) tokens.push_back(packet.token);
  }
  end.outgoing.clear();
  const int64_t port = end.port;
  for (uint64_t token : tokens) {
    if (tell) listeners_.at(port)->on_sent(id, token);
  }
}

inline void FakeNetwork::finish(comm::ConnectionId id) {
  End& end = ends_.at(id);
  const int64_t port = end.port;
  const bool tell_closed = end.lost && !end.closed_by_owner;
  const bool accepted = end.told_accept;
  release(id, end, true);
  const auto other = ends_.find(end.other);
  if (other != ends_.end()) other->second.lost = true;
  ends_.erase(id);
  if (tell_closed && accepted)
    listeners_.at(port)->on_closed(id, make_error(ErrorKind::kUnavailable, "connection lost"));
}

inline void FakeNetwork::deliver(comm::ConnectionId from, size_t index) {
  End& end = ends_.at(from);
  Packet& packet = end.outgoing[index];
  if (packet.token != 0) {  // first the transport takes the payload
    packet.payload.assign(packet.source.begin(), packet.source.end());
    const uint64_t token = std::exchange(packet.token, 0);
    listeners_.at(end.port)->on_sent(from, token);
    return;
  }
  const comm::ConnectionId to = end.other;
  Packet taken;
  if (chance(faults_.repeat)) {
    taken = packet;
  } else {
    taken = std::move(packet);
    end.outgoing.erase(end.outgoing.begin() + static_cast<ptrdiff_t>(index));
  }
  if (chance(faults_.drop)) return;
  if (!taken.payload.empty() && chance(faults_.damage)) {
    taken.payload[random_() % taken.payload.size()] ^= static_cast<std::byte>(1U << (random_() % 8));
  }
  const auto other = ends_.find(to);
  if (other == ends_.end() || other->second.lost || other->second.closed_by_owner) return;
  comm::MessageHandler& handler = *listeners_.at(other->second.port);
  // As over streams: a payload may be written to its place before it is handled.
  std::vector<comm::MutableByteSpan> place;
  if (!taken.payload.empty() && chance(0.5) &&
      handler.find_place(to, taken.message, std::ssize(taken.payload), place)) {
    size_t position = 0;
    for (const comm::MutableByteSpan piece : place) {
      std::copy_n(taken.payload.begin() + static_cast<ptrdiff_t>(position), piece.size(), piece.begin());
      position += piece.size();
    }
    CHECK_EQ(position, taken.payload.size());
    return handler.on_placed_message(to, taken.message, std::ssize(taken.payload));
  }
  handler.on_message(to, taken.message, taken.payload);
}

inline bool FakeNetwork::step() {
  struct Choice {
    comm::ConnectionId id;
    enum class What : uint8_t { kAccept, kFinish, kDeliver } what;
  };
  std::vector<Choice> choices;
  for (const auto& [id, end] : ends_) {
    if (!end.told_accept) choices.push_back({id, Choice::What::kAccept});
    if (end.lost || end.closed_by_owner) {
      choices.push_back({id, Choice::What::kFinish});
    } else if (!end.outgoing.empty()) {
      // The peer must have heard of the connection.
      const auto other = ends_.find(end.other);
      if (other == ends_.end() || other->second.told_accept) choices.push_back({id, Choice::What::kDeliver});
    }
  }
  if (choices.empty()) return false;
  const Choice choice = choices[random_() % choices.size()];
  End& end = ends_.at(choice.id);
  switch (choice.what) {
    case Choice::What::kAccept:
      end.told_accept = true;
      listeners_.at(end.port)->on_accept(choice.id);
      break;
    case Choice::What::kFinish:
      finish(choice.id);
      break;
    case Choice::What::kDeliver:
      deliver(choice.id, chance(faults_.reorder) ? random_() % end.outgoing.size() : 0);
      break;
  }
  return true;
}

inline void FakeNetwork::cut_one() {
  if (ends_.empty()) return;
  auto chosen = ends_.begin();
  std::advance(chosen, static_cast<ptrdiff_t>(random_() % ends_.size()));
  chosen->second.lost = true;
  const auto other = ends_.find(chosen->second.other);
  if (other != ends_.end()) other->second.lost = true;
}

}  // namespace tandem::transfer
