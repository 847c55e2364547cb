// How the routers of a simulation reach workers: what RemoteWorker does over HTTP in production.
#pragma once

#include <map>

#include "src/engine/engine.h"
#include "src/sim/network.h"

namespace tandem::sim {

using LegId = StrongId<struct LegIdTag, uint64_t>;

// Error::code of a leg whose worker could not be reached, and of one that went away with the request.
inline constexpr const char* kLegRefused = "leg_refused";
inline constexpr const char* kLegLost = "leg_lost";

class Legs {
 public:
  virtual ~Legs() = default;
  // Events come to `sink` in order, the last one with `finish` or `error`; never from inside this call.
  virtual LegId open(int node, engine::TokenRequest request, engine::EventSink sink) = 0;
  // No event follows. The worker hears of it later.
  virtual void cancel(LegId id) = 0;
  // As cancel, but if the worker has ended before it hears of that, its last event still comes (HttpClient::leave).
  virtual void leave(LegId id) = 0;
  // Nobody comes for the publication (RemoteWorker::release): the worker hears of it later, or never.
  virtual void release(int node, const transfer::KvTransferParams& publication) = 0;
};

// What a leg needs of the workers.
class Workers {
 public:
  virtual ~Workers() = default;
  // The worker that runs at this place now; null while it is dead.
  virtual engine::Engine* engine(int node) = 0;
  virtual uint64_t incarnation(int node) = 0;
  virtual void poke(int node) = 0;
};

class NetworkLegs final : public Legs {
 public:
  // The router stands at place `router` of the network.
  NetworkLegs(EventQueue& queue, Random& random, Network& network, Workers& workers, int router);

  LegId open(int node, engine::TokenRequest request, engine::EventSink sink) override;
  void cancel(LegId id) override;
  void leave(LegId id) override;
  void release(int node, const transfer::KvTransferParams& publication) override;
  // The process died: its kernel closes the connections of its legs.
  void lose_worker(int node, uint64_t incarnation);
  int64_t num_open() const { return std::ssize(legs_); }

 private:
  // As in production.
  static constexpr int64_t kLeaveUs = 1'000'000;
  static constexpr int64_t kReleaseUs = 5'000'000;

  struct Leg {
    int node = 0;
    engine::EventSink sink;
    uint64_t incarnation = 0;  // 0: the worker has not heard of it
    RequestId request;         // there
    int64_t last_event_us = 0;
    bool has_ended = false;  // there; its last event may be under way
  };
  void submit(LegId id, engine::TokenRequest request);
  void come_back(LegId id, int64_t delay_us, engine::TokenEvent event);
  void deliver(LegId id, engine::TokenEvent event);

  EventQueue& queue_;
  Random& random_;
  Network& network_;
  Workers& workers_;
  const int router_;
  std::map<LegId, Leg> legs_;
  uint64_t next_leg_ = 1;
};

}  // namespace tandem::sim
