#include "src/sim/legs.h"

#include <memory>
#include <utility>

#include "src/sim/violation.h"

namespace tandem::sim {

using engine::TokenEvent;

NetworkLegs::NetworkLegs(EventQueue& queue, Random& random, Network& network, Workers& workers, int router)
    : queue_(queue), random_(random), network_(network), workers_(workers), router_(router) {}

LegId NetworkLegs::open(int node, engine::TokenRequest request, engine::EventSink sink) {
  const LegId id(next_leg_++);
  Leg& leg = legs_[id];
  leg.node = node;
  leg.sink = std::move(sink);
  const int64_t at_us = network_.passable_at(router_, node, queue_.now_us() + network_.delay_us());
  const auto shared = std::make_shared<engine::TokenRequest>(std::move(request));
  queue_.add(at_us, {node, 0}, [this, id, shared] { submit(id, std::move(*shared)); });
  return id;
}

void NetworkLegs::submit(LegId id, engine::TokenRequest request) {
  const auto found = legs_.find(id);
  if (found == legs_.end()) return;  // cancelled on the way
  Leg& leg = found->second;
  engine::Engine* engine = workers_.engine(leg.node);
  if (engine == nullptr) {
    TokenEvent refused;
    refused.error = make_error(ErrorKind::kUnavailable, "worker {} does not answer: connection refused", leg.node);
    refused.error->code = kLegRefused;
    return come_back(id, network_.delay_us(), std::move(refused));
  }
  leg.incarnation = workers_.incarnation(leg.node);
  leg.request =
      engine->submit(std::move(request), [this, id, node = leg.node, ended = false](TokenEvent&& event) mutable {
        if (ended) throw Violation("one-end", fmt::format("worker {} sends an event after the last one", node));
        ended = event.finish.has_value() || event.error.has_value();
        if (const auto open = legs_.find(id); open != legs_.end()) open->second.has_ended = ended;
        come_back(id, network_.delay_us(), std::move(event));
      });
  workers_.poke(leg.node);
}

// An event of the worker is on its way to the router, behind those before it.
void NetworkLegs::come_back(LegId id, int64_t delay_us, TokenEvent event) {
  const auto found = legs_.find(id);
  if (found == legs_.end()) return;
  Leg& leg = found->second;
  const int64_t at_us = network_.passable_at(leg.node, router_, queue_.now_us() + delay_us);
  leg.last_event_us = std::max(leg.last_event_us, at_us);
  const auto shared = std::make_shared<TokenEvent>(std::move(event));
  queue_.add(leg.last_event_us, {}, [this, id, shared] { deliver(id, std::move(*shared)); });
}

void NetworkLegs::deliver(LegId id, TokenEvent event) {
  const auto found = legs_.find(id);
  if (found == legs_.end()) return;
  const bool last = event.finish.has_value() || event.error.has_value();
  const engine::EventSink sink = found->second.sink;
  if (last) legs_.erase(found);
  sink(std::move(event));
}

void NetworkLegs::cancel(LegId id) {
  const auto found = legs_.find(id);
  if (found == legs_.end()) return;
  const Leg leg = std::move(found->second);
  legs_.erase(found);
  if (leg.incarnation == 0) return;
  const int64_t at_us = network_.passable_at(router_, leg.node, queue_.now_us() + network_.delay_us());
  queue_.add(at_us, {leg.node, leg.incarnation}, [this, node = leg.node, request = leg.request] {
    workers_.engine(node)->cancel(request);
    workers_.poke(node);
  });
}

// The connection is half closed. A worker that has not answered when it learns that closes it; another one answers.
void NetworkLegs::leave(LegId id) {
  const auto found = legs_.find(id);
  if (found == legs_.end()) return;
  if (found->second.incarnation == 0) return cancel(id);
  const Leg& leg = found->second;
  const int64_t at_us = network_.passable_at(router_, leg.node, queue_.now_us() + network_.delay_us());
  queue_.add(at_us, {leg.node, leg.incarnation}, [this, id, node = leg.node, request = leg.request] {
    const auto open = legs_.find(id);
    if (open != legs_.end() && open->second.has_ended) return;
    if (open != legs_.end()) legs_.erase(open);
    workers_.engine(node)->cancel(request);
    workers_.poke(node);
  });
  queue_.add(queue_.now_us() + kLeaveUs, {}, [this, id] { legs_.erase(id); });
}

void NetworkLegs::release(int node, const transfer::KvTransferParams& publication) {
  const int64_t at_us = network_.passable_at(router_, node, queue_.now_us() + network_.delay_us());
  if (at_us > queue_.now_us() + kReleaseUs) return;  // given up
  queue_.add(at_us, {node, 0}, [this, node, publication] {
    engine::Engine* engine = workers_.engine(node);
    if (engine == nullptr) return;
    engine->release(publication);
    workers_.poke(node);
  });
}

void NetworkLegs::lose_worker(int node, uint64_t incarnation) {
  for (const auto& [id, leg] : legs_) {
    if (leg.node != node || leg.incarnation != incarnation) continue;
    TokenEvent lost;
    lost.error = make_error(ErrorKind::kUnavailable, "worker {} closed the connection", node);
    lost.error->code = kLegLost;
    come_back(id, random_.range(10'000, 50'000), std::move(lost));
  }
}

}  // namespace tandem::sim
