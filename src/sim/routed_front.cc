#include "src/sim/routed_front.h"

#include <charconv>
#include <nlohmann/json.hpp>
#include <utility>

#include "src/sim/violation.h"
#include "src/transfer/params.h"

namespace tandem::sim {

using engine::TokenEvent;
using engine::TokenRequest;
using router::Role;
using router::WorkerId;

RoutedFront::RoutedFront(const Surroundings& around, router::CoreOptions options, int num_prefill, int num_decode,
                         bool all_alike)
    : around_(around),
      enforces_disagg_(options.enforce_disagg),
      pulls_(options.pull),
      clients_(around.queue, around.trace, around.checker),
      core_(options, *this, metrics_) {
  const auto add = [this](Role role, int node) {
    const WorkerId id = core_.add_worker(role, std::to_string(node)).value();
    nodes_.push_back(node);
    open_probes_.push_back(0);
    core_.probe_result(id, true, around_.queue.now_us());
    probe(id);
  };
  const int all = num_prefill + num_decode;
  for (int node = 0; node < (all_alike ? all : num_prefill); ++node) add(Role::kPrefill, node);
  for (int node = all_alike ? 0 : num_prefill; node < all; ++node) add(Role::kDecode, node);
}

// ---- Clients -------------------------------------------------------------------------------------------------------

void RoutedFront::start(RequestSpec spec) {
  requests_.push_back(std::make_unique<ClientRequest>());
  ClientRequest& request = *requests_.back();
  spec.may_lack_room = enforces_disagg_;
  clients_.arrive(request, std::move(spec), requests_.size() - 1);
  const RequestId id(request.index + 1);
  if (request.spec.cancel_at_us != 0) {
    around_.queue.add(request.spec.cancel_at_us, {}, [this, &request, id] {
      if (request.ended) return;
      around_.trace.add(What::kCancel, Owner::kNobody, request.index);
      request.cancelled = true;
      if (!core_.cancel(id, around_.queue.now_us())) {
        throw Violation("one-end", fmt::format("the router has forgotten request {}", request.index));
      }
      const Error left = make_error(ErrorKind::kAborted, "the client has left");
      clients_.end(request, &left);
      settle();
    });
  }
  around_.queue.add(request.spec.deadline_us + Clients::kGraceUs, {}, [&request] {
    if (!request.ended) throw Violation("deadline", fmt::format("request {} never ended", request.index));
  });
  TokenRequest asked;
  asked.external_id = std::to_string(request.index);
  asked.prompt = request.spec.prompt;
  asked.sampling.max_tokens = request.spec.max_tokens;
  asked.sampling.temperature = 0;
  asked.deadline_us = request.spec.deadline_us;
  core_.submit(
      id, std::move(asked), [this, &request](TokenEvent&& event) { on_event(request, std::move(event)); },
      around_.queue.now_us());
  settle();
}

void RoutedFront::on_event(ClientRequest& request, TokenEvent&& event) {
  if (request.ended) throw Violation("one-end", fmt::format("request {} hears more after its end", request.index));
  clients_.take_tokens(request, Owner::kNobody, event);
  if (event.error) return clients_.end(request, &*event.error);
  if (event.finish) clients_.end(request, nullptr);
}

// ---- Legs ----------------------------------------------------------------------------------------------------------

void RoutedFront::open_leg(const router::LegOrder& order) {
  const int node = nodes_[static_cast<size_t>(order.worker.value)];
  TokenRequest leg = order.request;
  leg.deadline_us = order.deadline_us;
  if (!order.transfer.empty()) {
    leg.kv_transfer = transfer::parse_kv_transfer_params(nlohmann::json::parse(order.transfer)).value();
  }
  if (order.role == Role::kPrefill) leg.sampling.max_tokens = 1;
  size_t index = 0;
  std::from_chars(leg.external_id.data(), leg.external_id.data() + leg.external_id.size(), index);
  around_.trace.add(What::kLeg, node, index, order.role == Role::kPrefill ? 1 : 0);
  if (!requests_[index]->tokens.empty()) around_.trace.add(What::kRetry, node, index, requests_[index]->tokens.size());
  const std::string fetched = leg.kv_transfer && leg.kv_transfer->do_remote_prefill &&
                                      leg.kv_transfer->mode == transfer::TransferMode::kPull
                                  ? leg.kv_transfer->remote_request_id
                                  : "";
  const LegId id = around_.legs.open(node, std::move(leg),
                                     [this, leg_id = order.id, worker = order.worker](TokenEvent&& event) {
                                       on_leg_event(leg_id, worker, std::move(event));
                                     });
  ClientRequest& request = *requests_[index];
  const bool is_pull = pulls_ && !order.transfer.empty();
  const bool is_first = order.role == (is_pull ? Role::kPrefill : Role::kDecode);
  if (is_first) request.nodes.clear();
  request.nodes.push_back(node);
  request.fetches = is_pull && !is_first;
  legs_[order.id] = {id, index, order.role, node, order.publishes, fetched};
}

void RoutedFront::cancel_leg(router::LegId id) {
  const auto leg = legs_.extract(id);
  if (leg.empty()) return;
  leg.mapped().publishes ? around_.legs.leave(leg.mapped().id) : around_.legs.cancel(leg.mapped().id);
  around_.checker.expect_no_reader(leg.mapped().fetched);
}

void RoutedFront::release(WorkerId worker, const std::string& transfer) {
  around_.legs.release(nodes_[static_cast<size_t>(worker.value)],
                       transfer::parse_kv_transfer_params(nlohmann::json::parse(transfer)).value());
}

void RoutedFront::on_leg_event(router::LegId id, WorkerId worker, TokenEvent&& event) {
  const auto found = legs_.find(id);
  if (found == legs_.end()) {  // cancelled; this crossed it
    if (!event.kv_transfer || !event.finish) return;
    around_.checker.hear_of(event.kv_transfer->remote_request_id);
    core_.publication_unwanted(worker, transfer::to_json(*event.kv_transfer).dump());
    return around_.checker.expect_no_reader(event.kv_transfer->remote_request_id);
  }
  const OpenLeg leg = found->second;
  const int64_t now_us = around_.queue.now_us();
  if (leg.publishes && event.kv_transfer) around_.checker.hear_of(event.kv_transfer->remote_request_id);
  if (event.finish || event.error) {
    legs_.erase(id);
    around_.checker.expect_no_reader(leg.fetched);
    around_.trace.add(What::kLegEnd, leg.node, leg.request,
                      event.error ? 1 + static_cast<uint64_t>(event.error->kind) : 0);
  }
  if (event.error) {
    const bool is_lost = event.error->code == kLegLost;
    const bool reached = !is_lost && event.error->code != kLegRefused;
    core_.leg_failed(id, {std::move(*event.error), reached, is_lost}, now_us);
    return settle();
  }
  std::string transfer = event.kv_transfer ? transfer::to_json(*event.kv_transfer).dump() : "";
  if (leg.role == Role::kPrefill) {
    if (event.finish) core_.leg_done(id, std::move(transfer), now_us);
  } else if (!transfer.empty() && !event.finish) {
    core_.leg_reserved(id, std::move(transfer), now_us);
  } else {
    core_.leg_event(id, std::move(event), now_us);
  }
  settle();
}

// ---- Probes and time -----------------------------------------------------------------------------------------------

// An answer comes from a worker that lives and is not frozen; a dead one's host refuses the connection.
void RoutedFront::probe(WorkerId worker) {
  const uint64_t number = next_probe_++;
  open_probes_[static_cast<size_t>(worker.value)] = number;
  const int node = nodes_[static_cast<size_t>(worker.value)];
  const auto way = [this](int from, int to) {
    return around_.network.passable_at(from, to, around_.queue.now_us() + around_.network.delay_us());
  };
  around_.queue.add(way(around_.place, node), {node, 0}, [this, worker, number, node, way] {
    const bool lives = around_.workers.engine(node) != nullptr;
    around_.queue.add(way(node, around_.place), {}, [this, worker, number, lives] { told(worker, number, lives); });
  });
  around_.queue.add(around_.queue.now_us() + kProbeUs, {}, [this, worker, number] { told(worker, number, false); });
}

void RoutedFront::told(WorkerId worker, uint64_t number, bool success) {
  uint64_t& open = open_probes_[static_cast<size_t>(worker.value)];
  if (open != number) return;
  open = 0;
  around_.queue.add(around_.queue.now_us() + (success ? kProbeUs : kProbeUs / 4), {},
                    [this, worker] { probe(worker); });
  core_.probe_result(worker, success, around_.queue.now_us());
  settle();
}

void RoutedFront::settle() {
  const int64_t next_us = core_.next_tick_us();
  if (next_us >= tick_at_us_) return;
  tick_at_us_ = next_us;
  around_.queue.add(next_us, {}, [this, next_us] {
    if (next_us != tick_at_us_) return;
    tick_at_us_ = INT64_MAX;
    core_.tick(around_.queue.now_us());
    settle();
  });
}

// ---- At rest -------------------------------------------------------------------------------------------------------

void RoutedFront::check_at_rest() const {
  clients_.check_at_rest();
  if (core_.num_requests() != 0 || core_.num_legs() != 0 || core_.num_waiting() != 0 || !legs_.empty() ||
      core_.next_tick_us() != INT64_MAX) {
    throw Violation("at-rest", fmt::format("the router holds {} requests, {} legs, {} waiting", core_.num_requests(),
                                           core_.num_legs(), core_.num_waiting()));
  }
  for (const router::RegisteredWorker& worker : core_.workers().workers()) {
    if (worker.load->requests != 0 || worker.load->tokens != 0) {
      throw Violation("at-rest", fmt::format("load counters of worker {}: {} requests, {} tokens", worker.url,
                                             worker.load->requests, worker.load->tokens));
    }
    if (worker.tracker.health() != router::Health::kUp) {
      throw Violation("at-rest", fmt::format("worker {} is still thought to be down", worker.url));
    }
  }
}

}  // namespace tandem::sim
