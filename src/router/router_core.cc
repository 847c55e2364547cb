#include "src/router/router_core.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>

#include "src/base/check.h"
#include "src/base/log.h"
#include "src/router/routed_request.h"
#include "src/router/router_metrics.h"

namespace tandem::router {

RouterCore::RouterCore(CoreOptions options, LegPort& port, Registry& metrics)
    : options_(options),
      port_(port),
      registry_(options.registry),
      budget_(options.retry_share),
      metrics_(std::make_unique<RouterMetrics>(metrics, options_.front_end)) {}

RouterCore::~RouterCore() = default;

// ---- The life of a request -----------------------------------------------------------------------------------------

void RouterCore::submit(RequestId id, engine::TokenRequest request, engine::EventSink sink, int64_t now_us) {
  std::optional<Error> refusal;
  if (request.kv_transfer && !options_.passes_transfers) {
    refusal = invalid_argument("kv_transfer_params", "kv_transfer_params may not be given to a router; ask a worker");
  } else if (num_started_ >= options_.max_requests && std::ssize(queue_) >= options_.queue_size) {
    refusal = make_error(ErrorKind::kResourceExhausted,
                         "{} requests are at workers and {} wait, the most this router takes; retry later",
                         num_started_, queue_.size());
  }
  if (!refusal && !request.prefiller.empty()) {
    if (Status named = check_prefiller(request.prefiller); !named.ok()) refusal = named.error();
  }
  if (refusal) {
    metrics_->outcome(refusal->kind);
    engine::TokenEvent event;
    event.error = std::move(*refusal);
    return sink(std::move(event));
  }
  auto owned = std::make_unique<Routed>(id, std::move(request), std::move(sink), options_.repeats);
  Routed& routed = *owned;
  CHECK(requests_.emplace(id, std::move(owned)).second);
  const int64_t latest_us = now_us + options_.request_timeout_us;
  routed.deadline_us = routed.request.deadline_us > 0 ? std::min(routed.request.deadline_us, latest_us) : latest_us;
  routed.arrived_us = now_us;
  if (!routed.request.session.empty()) routed.session = std::hash<std::string>{}(routed.request.session) | 1U;
  if (needs_prompt_blocks()) {
    routed.prompt_blocks = hash_prompt_blocks(routed.request.prompt, routed.request.cache_salt);
  }
  budget_.request();
  if (num_started_ < options_.max_requests) return start(routed, now_us);
  queue_.insert(id);
  set_timer(routed, std::min(routed.deadline_us, now_us + options_.queue_timeout_us));
}

void RouterCore::start(Routed& routed, int64_t now_us) {
  queue_.erase(routed.id);
  routed.is_started = true;
  ++num_started_;
  metrics_->queue_seconds.observe(seconds(now_us - routed.arrived_us));
  perform(routed, routed.legs.start(), now_us);
}

bool RouterCore::cancel(RequestId id, int64_t now_us) {
  const auto found = requests_.find(id);
  if (found == requests_.end()) return false;
  Routed& routed = *found->second;
  if (!routed.legs.is_answered()) metrics_->outcome("cancelled");
  perform(routed, routed.legs.cancel(), now_us);
  return true;
}

// Carries out actions in order; those that an action brings about follow. The request may be gone afterwards.
void RouterCore::perform(Routed& routed, LegActions actions, int64_t now_us) {
  for (size_t i = 0; i < actions.size(); ++i) {
    LegAction action = std::move(actions[i]);
    for (LegAction& next : perform_one(routed, action, now_us)) actions.push_back(std::move(next));
  }
  if (routed.legs.is_closed()) close(routed, now_us);
}

LegActions RouterCore::perform_one(Routed& routed, LegAction& action, int64_t now_us) {
  if (const PickWorkers* pick = std::get_if<PickWorkers>(&action)) {
    if (pick->without_transfer) {
      if (options_.enforce_disagg) return routed.legs.none_available({});
      routed.needs_no_transfer = routed.is_attempt_free = true;
    }
    return pick_workers(routed, pick->resumes, now_us);
  }
  if (EmitEvent* event = std::get_if<EmitEvent>(&action)) emit(routed, std::move(event->event), now_us);
  if (StartDecode* leg = std::get_if<StartDecode>(&action)) open_leg(routed, Role::kDecode, leg->worker, leg->transfer);
  if (StartPrefill* leg = std::get_if<StartPrefill>(&action)) {
    open_leg(routed, Role::kPrefill, leg->worker, leg->transfer);
  }
  if (std::get_if<CancelDecode>(&action)) cancel_leg(routed, Role::kDecode);
  if (std::get_if<CancelPrefill>(&action)) cancel_leg(routed, Role::kPrefill);
  if (const ReleasePublication* release = std::get_if<ReleasePublication>(&action)) {
    publication_unwanted(release->worker, release->transfer);
  }
  return {};
}

LegActions RouterCore::pick_workers(Routed& routed, bool resumes, int64_t now_us) {
  parked_.erase(routed.id);
  release_loads(routed);  // of a failed attempt
  Result<Attempt> plan = plan_attempt(routed, resumes, now_us);
  if (!plan.ok()) return nobody_there(routed, std::move(plan).error(), now_us);
  if (routed.legs.attempts() > 0 && !std::exchange(routed.is_attempt_free, false)) {
    if (!routed.is_repeat_paid && !budget_.take()) {
      return routed.legs.none_available(make_error(ErrorKind::kUnavailable, "no repeats are left; try again later"));
    }
    routed.is_repeat_paid = false;
    (resumes ? metrics_->migrations : metrics_->retries).add();
    log_warning("router", "[{}] {} on {}", routed.request.external_id,
                resumes ? fmt::format("goes on behind {} tokens", routed.emitted.size())
                        : fmt::format("attempt {}", routed.legs.attempts() + 1),
                registry_.worker(plan->decode).url);
  }
  const bool falls_back = !plan->prefill && registry_.has_role(Role::kPrefill);
  count_after_failure(routed, resumes ? "migrated" : falls_back ? "fallen_back" : "retried");
  if (resumes) routed.request.resumed = routed.emitted;
  routed.park_until_us = 0;
  routed.attempt_us = now_us;
  routed.reserved_us = routed.prefilled_us = 0;
  take_load(routed, Role::kDecode, plan->decode);
  if (plan->prefill) take_load(routed, Role::kPrefill, *plan->prefill);
  set_timer(routed, routed.deadline_us + kDeadlineSlackUs);
  return routed.legs.picked(*plan);
}

// The request waits, since a worker is often back within seconds. A new one does so only if somebody was there lately;
// one that has been tried takes its next attempt from the budget.
LegActions RouterCore::nobody_there(Routed& routed, Error error, int64_t now_us) {
  if (routed.park_until_us == 0) {
    const bool is_new = routed.legs.attempts() == 0;
    if (is_new ? !may_be_back(now_us) : !budget_.take()) return routed.legs.none_available(std::move(error));
    routed.is_repeat_paid = !is_new;
    routed.park_until_us = std::min(now_us + options_.rescue_us, routed.deadline_us);
  }
  if (now_us >= routed.park_until_us) {
    routed.park_until_us = 0;
    return routed.legs.none_available(std::move(error));
  }
  parked_.insert(routed.id);
  set_timer(routed, std::min(routed.park_until_us, now_us + kParkedTickUs));
  return {};
}

void RouterCore::emit(Routed& routed, engine::TokenEvent event, int64_t now_us) {
  if (event.kv_transfer && event.tokens.empty() && !event.finish) return routed.sink(std::move(event));  // a reservation
  if (event.error) {
    metrics_->outcome(event.error->kind);
    count_after_failure(routed, "failed");
    log_warning("router", "[{}] {}", routed.request.external_id, event.error->message);
    return routed.sink(std::move(event));
  }
  if (!routed.usage) {
    routed.usage = event.usage;
    metrics_->first_token_seconds.observe(seconds(now_us - routed.arrived_us));
    if (routed.prefilled_us != 0) metrics_->handover_seconds.observe(seconds(now_us - routed.prefilled_us));
  }
  event.usage = *routed.usage;
  if (options_.repeats.migrations > 0) {
    for (const engine::GeneratedToken& token : event.tokens) routed.emitted.push_back(token.token);
  }
  if (event.finish) metrics_->outcome("ok");
  routed.sink(std::move(event));
}

void RouterCore::count_after_failure(Routed& routed, const char* outcome) {
  if (!routed.last_fault) return;
  const auto [worker, cause] = *std::exchange(routed.last_fault, std::nullopt);
  metrics_->after_failure(registry_.worker(worker), cause, outcome);
}

void RouterCore::close(Routed& routed, int64_t now_us) {
  CHECK(routed.decode_leg == LegId() && routed.prefill_leg == LegId());
  release_loads(routed);
  set_timer(routed, 0);
  queue_.erase(routed.id);
  parked_.erase(routed.id);
  if (routed.is_started) --num_started_;
  requests_.erase(routed.id);
  admit_waiting(now_us);
}

// Starting may end a request at once, which comes back here: the outermost call does it all.
void RouterCore::admit_waiting(int64_t now_us) {
  if (is_admitting_) return;
  is_admitting_ = true;
  while (!queue_.empty() && num_started_ < options_.max_requests) start(*requests_.at(*queue_.begin()), now_us);
  is_admitting_ = false;
}

int64_t RouterCore::num_retries() const { return static_cast<int64_t>(metrics_->retries.value()); }
int64_t RouterCore::num_migrations() const { return static_cast<int64_t>(metrics_->migrations.value()); }

// ---- Legs ----------------------------------------------------------------------------------------------------------

void RouterCore::open_leg(Routed& routed, Role role, WorkerId worker, const std::string& transfer) {
  const LegId id(next_leg_++);
  CHECK(routed.leg(role) == LegId());
  routed.leg(role) = id;
  legs_.emplace(id, Leg{routed.id, role, worker});
  // Another router that has the decode leg may ask for a publication as well.
  const std::optional<transfer::KvTransferParams>& given = routed.request.kv_transfer;
  const bool publishes = given ? given->do_remote_decode && given->mode == transfer::TransferMode::kPull
                               : role == Role::kPrefill && routed.legs.attempt().mode == LegMode::kPull;
  port_.open_leg({id, role, worker, routed.request, transfer, routed.deadline_us, publishes});
}

void RouterCore::cancel_leg(Routed& routed, Role role) {
  const LegId id = std::exchange(routed.leg(role), LegId());
  if (id == LegId()) return;
  legs_.erase(id);
  port_.cancel_leg(id);
}

// The request of a leg of `role`; null if the leg was cancelled. After the last word the leg is gone.
RouterCore::Routed* RouterCore::take_leg(LegId id, bool last) {
  const auto found = legs_.find(id);
  if (found == legs_.end()) return nullptr;
  Routed& routed = *requests_.at(found->second.request);
  if (last) {
    const Role role = found->second.role;
    routed.leg(role) = LegId();
    legs_.erase(found);
    release_load(routed, role);
  }
  return &routed;
}

void RouterCore::leg_reserved(LegId id, std::string transfer, int64_t now_us) {
  Routed* routed = take_leg(id, false);
  if (routed == nullptr) return;
  routed->reserved_us = now_us;
  metrics_->reserve_seconds.observe(seconds(now_us - routed->attempt_us));
  if (routed->request.kv_transfer) return hand_on_reservation(id, *routed, transfer, now_us);
  perform(*routed, routed->legs.decode_reserved(std::move(transfer)), now_us);
}

// To the caller, who has the prefill leg.
void RouterCore::hand_on_reservation(LegId id, Routed& routed, const std::string& transfer, int64_t now_us) {
  const nlohmann::json json = nlohmann::json::parse(transfer, nullptr, false);
  Result<transfer::KvTransferParams> params = transfer::parse_kv_transfer_params(json);
  if (!params.ok()) {
    return leg_failed(id, {make_error(ErrorKind::kDataLoss, "a worker's kv_transfer_params cannot be read")}, now_us);
  }
  engine::TokenEvent event;
  event.kv_transfer = std::move(params).value();
  perform(routed, routed.legs.decode_event(std::move(event)), now_us);
}

void RouterCore::leg_event(LegId id, engine::TokenEvent event, int64_t now_us) {
  const WorkerId worker = worker_of(id);
  Routed* routed = take_leg(id, event.finish.has_value());
  if (routed == nullptr) return;
  if (!routed->request.kv_transfer) event.kv_transfer.reset();  // none of a client's business
  routed->decode_load.grow(std::ssize(event.tokens));
  if (event.finish) record_success(worker, now_us);
  const Attempt& attempt = routed->legs.attempt();
  if (!routed->legs.has_emitted() && attempt.prefill) {
    registry_.record_pair(*attempt.prefill, attempt.decode, true, now_us);
  }
  perform(*routed, routed->legs.decode_event(std::move(event)), now_us);
}

void RouterCore::leg_done(LegId id, std::string transfer, int64_t now_us) {
  const WorkerId worker = worker_of(id);
  Routed* routed = take_leg(id, true);
  if (routed == nullptr) return;
  record_success(worker, now_us);
  routed->prefilled_us = now_us;
  metrics_->prefill_seconds.observe(
      seconds(now_us - (routed->reserved_us != 0 ? routed->reserved_us : routed->attempt_us)));
  perform(*routed, routed->legs.prefill_done(std::move(transfer)), now_us);
}

void RouterCore::leg_failed(LegId id, LegFault fault, int64_t now_us) {
  const auto found = legs_.find(id);
  if (found == legs_.end()) return;
  const Leg leg = found->second;
  Routed& routed = *requests_.at(leg.request);
  record_failure(leg, routed, fault, now_us);
  // A prefill leg that fails once decode has all it needs has no consequence.
  const bool matters = leg.role == Role::kDecode || !routed.legs.has_emitted();
  if (matters && !routed.legs.is_answered()) routed.last_fault.emplace(leg.worker, fault.error.kind);
  take_leg(id, true);
  perform(routed,
          leg.role == Role::kDecode ? routed.legs.decode_failed(std::move(fault))
                                    : routed.legs.prefill_failed(std::move(fault)),
          now_us);
}

void RouterCore::publication_unwanted(WorkerId worker, const std::string& transfer) {
  metrics_->released_publications.add();
  port_.release(worker, transfer);
}

// ---- Time ----------------------------------------------------------------------------------------------------------

void RouterCore::set_timer(Routed& routed, int64_t at_us) {
  if (routed.timer_us == at_us) return;
  if (routed.timer_us != 0) timers_.erase({routed.timer_us, routed.id});
  routed.timer_us = at_us;
  if (at_us != 0) timers_.insert({at_us, routed.id});
}

int64_t RouterCore::next_tick_us() const {
  return timers_.empty() ? std::numeric_limits<int64_t>::max() : timers_.begin()->first;
}

void RouterCore::tick(int64_t now_us) {
  while (next_tick_us() <= now_us) {
    Routed& routed = *requests_.at(timers_.begin()->second);
    set_timer(routed, 0);
    expire(routed, now_us);
  }
}

void RouterCore::expire(Routed& routed, int64_t now_us) {
  if (!routed.is_started) {
    Error error = now_us >= routed.deadline_us
                      ? make_error(ErrorKind::kDeadlineExceeded, "the request's deadline passed in the router's queue")
                      : make_error(ErrorKind::kUnavailable, "no place became free within {} s; try again later",
                                   options_.queue_timeout_us / 1'000'000);
    return perform(routed, routed.legs.none_available(std::move(error)), now_us);
  }
  if (parked_.contains(routed.id)) {
    return perform(routed, pick_workers(routed, routed.legs.has_emitted(), now_us), now_us);
  }
  perform(routed, routed.legs.deadline_passed(), now_us);
}

}  // namespace tandem::router
