// How one rank and the ranks of other hosts write into each other's windows during one epoch: a UCX worker of its own,
// with a thread that sleeps in the kernel until something arrives.
//
// Active messages, not ucp_put_nbx: over TCP UCX 1.13 has no remote writes anyway. It sends puts as active messages
// and copies them on the receiving side; and there it must answer each one, and ends the process when the sender's
// endpoint has failed meanwhile (ucp_put_handler), as it has whenever a rank was killed or stopped. Messages of our own
// cost the same copy, need no answer, arrive in order (so that no fence is needed between data and counter), and the
// receiver checks where they go: a late one of another epoch has another stamp and is dropped. And one message takes what
// lies in many places to many places, and the counter with it: outputs of experts are thousands of small puts.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/comm/bell.h"
#include "src/group/fabric.h"

namespace tandem::group {

struct NetworkPortOptions {
  std::string host;             // an address of this machine that the peers can reach
  RankId rank;
  int32_t size = 0;
  std::byte* region = nullptr;  // of this rank, for the counters; MappedFabric's layout
  std::span<std::byte> window;  // into which peers write
  std::byte* bell = nullptr;    // of its engine thread
  int64_t rank_timeout_us = 0;
  // Called from the port's thread when outcome() has come. Like all that the port calls, it must not call the port.
  std::function<void()> on_outcome;
};

struct NetworkPeer {
  RankId rank;
  std::string address;                    // what its port says
  std::atomic<uint64_t>* pulse = nullptr;  // stands in for that rank's pulse; outlives the port
};

class NetworkPort {
 public:
  static Result<std::unique_ptr<NetworkPort>> open(const NetworkPortOptions& options);
  // Returns within kCloseUs, also if peers are gone.
  virtual ~NetworkPort() = default;

  // For the peers' ports; at most kMaxNetworkBytes.
  virtual std::string address() const = 0;
  // Once. Starts to connect to all peers; both directions are tried before outcome() says so.
  virtual Status connect(std::vector<NetworkPeer> peers) = 0;

  struct Outcome {
    std::optional<Error> error;
    int32_t suspect = -1;
  };
  // Nothing while it connects. No later than after two rank time-outs.
  virtual std::optional<Outcome> outcome() const = 0;
  // From then on: called from the port's thread, once, when a peer has been out of reach for a fifth of the rank
  // time-out (before that the coordinator may have a better reason).
  virtual void set_on_lost(std::function<void(const Error&)> on_lost) = 0;

  // The engine thread's, after the outcome. What is sent to a lost peer is dropped.
  // `data` must stay until unsent_to() is nothing, or abandon() or the port's end. Small ones are gathered: they leave
  // with the next signal() to that rank, by push(), or when they are enough for a message.
  virtual void put(RankId to, int64_t offset, std::span<const std::byte> data) = 0;
  virtual void signal(RankId to, Channel channel, uint64_t value) = 0;
  virtual void push() = 0;        // what put() has gathered
  virtual void send_pulse() = 0;  // to all peers
  // A rank to which something is not yet on its way.
  virtual std::optional<RankId> unsent_to() const = 0;
  // Reads no data of put() any more.
  virtual void abandon() = 0;

  static constexpr int64_t kCloseUs = 500'000;
};

}  // namespace tandem::group
