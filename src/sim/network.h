// The network between agents: a comm::Messenger per worker over the event queue. Messages of one connection keep their
// order (as comm/messenger.h promises), those of different connections do not. The rest is as bad as the fault spec
// says.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "src/comm/messenger.h"
#include "src/sim/event_queue.h"
#include "src/sim/fault_spec.h"
#include "src/sim/random.h"
#include "src/sim/trace.h"

namespace tandem::sim {

class Network {
 public:
  // A connection over which nothing has come through for this long is closed by both kernels (TCP keepalive).
  static constexpr int64_t kKeepaliveUs = 5'000'000;
  static constexpr int64_t kFirstPort = 5000;  // node i listens on kFirstPort + i

  // Worker `i` of `num_nodes` may call listen() once per life.
  Network(EventQueue& queue, Random& random, Trace& trace, int num_nodes);

  // What comes for the node goes to `handler` until the messenger is destroyed, which is the death of the process.
  std::unique_ptr<comm::Messenger> listen(int node, comm::MessageHandler& handler);

  void set_faults(const FaultSpec& faults) { faults_ = faults; }
  // Nothing arrives from `from` at `to` for that long; it comes afterwards, unless the connection died of it.
  void cut(int from, int to, int64_t duration_us);
  void heal();
  // When something that leaves `from` now and arrives at `at_us` can be there, cuts considered.
  int64_t passable_at(int from, int to, int64_t at_us) const;
  int64_t delay_us();

  int64_t num_ends(int node) const;
  // The last moment at which a message was lost or damaged or a connection broken by a fault.
  int64_t last_fault_us() const { return last_fault_us_; }

 private:
  class Port;
  enum class Kind : uint8_t { kAccept, kMessage, kClose };
  struct Packet {
    Kind kind = Kind::kMessage;
    std::vector<std::byte> message;
    std::vector<std::byte> payload;
    std::span<const std::byte> source;  // not taken by the transport yet: still the sender's memory
    uint64_t token = 0;
  };
  // One side of a connection.
  struct End {
    int node = 0;
    comm::ConnectionId other;
    std::deque<Packet> leaving;   // waits for the transport
    std::deque<Packet> arriving;  // on the way to this side, in order
    int64_t last_arrival_us = 0;  // of what is on the way to this side
    bool taking = false;          // an event will take the first of `leaving`
    bool accepted = true;         // the node knows of the connection
    bool broken = false;          // on_closed is on its way, whatever else is
  };
  using Ends = std::unordered_map<comm::ConnectionId, End>;

  End* find(comm::ConnectionId id);
  comm::SendResult send(comm::ConnectionId id, std::span<const std::byte> message, std::span<const std::byte> payload,
                        uint64_t token);
  void connect(comm::ConnectionId id, int from, int to);
  void leave(int node);
  void close(comm::ConnectionId id);
  void kick(comm::ConnectionId id);
  void take_payload(comm::ConnectionId id);
  void transmit(comm::ConnectionId from, Packet packet, bool may_repeat);
  void put(comm::ConnectionId to, int from_node, Packet packet, int64_t delay);
  void arrive(comm::ConnectionId to, int from_node);
  void break_connection(comm::ConnectionId id);
  void tell_closed(comm::ConnectionId id);
  void give_back_payloads(comm::ConnectionId id, int node, std::deque<Packet>&& leaving);

  EventQueue& queue_;
  Random& random_;
  Trace& trace_;
  FaultSpec faults_;
  std::vector<comm::MessageHandler*> handlers_;  // by node; null: nobody listens
  Ends ends_;
  std::map<std::pair<int, int>, int64_t> cut_until_us_;
  uint64_t next_id_ = 1;
  int64_t last_fault_us_ = 0;
};

}  // namespace tandem::sim
