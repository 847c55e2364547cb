// RouterCore's side of the workers: whom an attempt goes to, and what is learnt from how it ended.
#include <algorithm>

#include "src/base/check.h"
#include "src/base/log.h"
#include "src/router/routed_request.h"
#include "src/router/router_core.h"
#include "src/router/router_metrics.h"

namespace tandem::router {

// ---- Planning ------------------------------------------------------------------------------------------------------

bool RouterCore::needs_prompt_blocks() const {
  return options_.local_prompt_tokens > 0 || options_.registry.prefill_policy == PolicyKind::kPrefixAware ||
         options_.registry.decode_policy == PolicyKind::kPrefixAware;
}

std::vector<WorkerId> RouterCore::excluded(const Routed& routed, int64_t now_us) const {
  std::vector<WorkerId> out;
  for (const auto& [worker, since_us] : routed.failed) {
    if (now_us < since_us + kExcludedForUs) out.push_back(worker);
  }
  return out;
}

Result<Attempt> RouterCore::plan_attempt(const Routed& routed, bool resumes, int64_t now_us) {
  const std::vector<WorkerId> failed = excluded(routed, now_us);
  PickContext context{
      .now_us = now_us, .excluded = failed, .prompt_blocks = routed.prompt_blocks, .session = routed.session,
      .rank = routed.request.pinned_rank};
  if (!routed.request.prefiller.empty()) context.named = registry_.find_prefiller(routed.request.prefiller);
  // Before anything is chosen: a choice takes a breaker's trial.
  const char* reason = resumes ? "migration" : local_reason(routed, context);
  if (!registry_.has_role(Role::kPrefill) && !context.named) {
    TANDEM_ASSIGN(const WorkerId decode, registry_.pick(Role::kDecode, context));
    return Attempt{.mode = LegMode::kPlain, .decode = decode};
  }
  const bool may_be_local = reason == nullptr && !options_.enforce_disagg && !context.named;
  if (may_be_local && !registry_.has_open(Role::kPrefill, context)) reason = "no_prefill_worker";
  TANDEM_ASSIGN(const WorkerId decode, registry_.pick(Role::kDecode, context));
  context.partner = decode;
  if (may_be_local && reason == nullptr && !registry_.has_open(Role::kPrefill, context)) reason = "no_path_to_prefill";
  if (reason != nullptr) {
    metrics_->local(reason);
    log_debug("router", "[{}] decode computes the prompt: {}", routed.request.external_id, reason);
    return Attempt{.mode = LegMode::kPlain, .decode = decode};
  }
  TANDEM_ASSIGN(const WorkerId prefill, registry_.pick(Role::kPrefill, context));
  if (registry_.worker(prefill).url == registry_.worker(decode).url) {
    // Its decode leg would hold the blocks that its prefill leg waits for.
    metrics_->local("same_worker");
    return Attempt{.mode = LegMode::kPlain, .decode = decode};
  }
  return Attempt{.mode = options_.pull ? LegMode::kPull : LegMode::kPush, .decode = decode, .prefill = prefill};
}

const char* RouterCore::local_reason(const Routed& routed, const PickContext& context) const {
  if (options_.enforce_disagg) return nullptr;
  if (context.named) return routed.needs_no_transfer ? "no_room" : nullptr;
  if (routed.request.sampling.max_tokens == 1) return "one_token";
  if (routed.request.is_one_of_several) return "several_choices";
  if (routed.needs_no_transfer) return "no_room";
  if (options_.local_prompt_tokens == 0) return nullptr;
  int64_t cached = 0;
  for (const RegisteredWorker& worker : registry_.workers()) {
    if (worker.role == Role::kDecode) cached = std::max(cached, worker.prefixes.cached_tokens(context.prompt_blocks));
  }
  return routed.prompt_tokens() - cached <= options_.local_prompt_tokens ? "short_prompt" : nullptr;
}

// ---- Load ----------------------------------------------------------------------------------------------------------

void RouterCore::take_load(Routed& routed, Role role, WorkerId worker) {
  routed.load(role) = registry_.acquire(worker, routed.prompt_tokens());
  routed.load_worker(role) = worker;
  metrics_->show(registry_.worker(worker));
}

void RouterCore::release_load(Routed& routed, Role role) {
  const WorkerId worker = std::exchange(routed.load_worker(role), WorkerId(-1));
  if (worker.value < 0) return;
  routed.load(role).release();
  registry_.settle(worker);
  metrics_->show(registry_.worker(worker));
}

void RouterCore::release_loads(Routed& routed) {
  release_load(routed, Role::kDecode);
  release_load(routed, Role::kPrefill);
}

// ---- Workers -------------------------------------------------------------------------------------------------------

Result<WorkerId> RouterCore::add_worker(Role role, std::string url, int64_t weight, int32_t rank) {
  TANDEM_ASSIGN(const WorkerId id, registry_.add(role, std::move(url), weight, rank));
  metrics_->add_worker(registry_.worker(id));
  metrics_->show(registry_.worker(id));
  return id;
}

void RouterCore::drain_worker(WorkerId id) {
  registry_.drain(id);
  metrics_->show(registry_.worker(id));
}

Status RouterCore::check_prefiller(const std::string& host_port) const {
  if (registry_.find_prefiller(host_port)) return {};
  constexpr size_t kShown = 64;
  return invalid_argument("x-prefiller-host-port",
                          "x-prefiller-host-port is '{}', which is no prefill worker of this router; name one of "
                          "--prefill, as host:port, or let the operator allow it with --allowed-prefillers",
                          host_port.substr(0, kShown));
}

bool RouterCore::is_ready() const {
  return registry_.has_healthy(Role::kDecode) &&
         (!registry_.has_role(Role::kPrefill) || registry_.has_healthy(Role::kPrefill) || !options_.enforce_disagg);
}

WorkerId RouterCore::worker_of(LegId id) const {
  const auto found = legs_.find(id);
  return found == legs_.end() ? WorkerId(-1) : found->second.worker;
}

void RouterCore::probe_result(WorkerId id, bool success, int64_t now_us, bool has_answered) {
  RegisteredWorker& worker = registry_.worker(id);
  if (worker.membership == Membership::kRemoved) return;
  if (success || has_answered) {
    worker.failing_since_us = 0;
  } else if (worker.failing_since_us == 0) {
    worker.failing_since_us = now_us;
  }
  record_health(id, success, now_us);
  const int64_t since_us = worker.failing_since_us;
  if (since_us != 0 && now_us - since_us >= options_.unresponsive_us) give_up_legs(id, now_us);
}

void RouterCore::set_health(std::span<const WorkerId> ids, bool is_up, int64_t now_us) {
  constexpr int kProbes = std::max(HealthTracker::kFailuresToDown, HealthTracker::kSuccessesToUp);
  bool came_up = false;
  for (const WorkerId id : ids) {
    RegisteredWorker& worker = registry_.worker(id);
    if (worker.membership == Membership::kRemoved) continue;
    if (is_up) worker.failing_since_us = 0;
    for (int i = 0; i < kProbes; ++i) came_up |= note_health(id, is_up, now_us);
  }
  if (came_up) retry_parked(now_us);
}

void RouterCore::record_health(WorkerId id, bool success, int64_t now_us) {
  if (note_health(id, success, now_us)) retry_parked(now_us);
}

// True if the worker has come up by it.
bool RouterCore::note_health(WorkerId id, bool success, int64_t now_us) {
  RegisteredWorker& worker = registry_.worker(id);
  if (!worker.tracker.record(success)) return false;
  const bool is_up = worker.tracker.health() == Health::kUp;
  log_info("router", "{} worker {} is {}", role_name(worker.role), worker.url, is_up ? "up" : "down");
  if (!is_up) worker.prefixes.clear();  // a process that comes back has an empty cache
  worker.down_since_us = is_up ? 0 : now_us;
  if (is_up) worker.breaker.came_back(now_us);
  metrics_->show(worker);
  return is_up;
}

bool RouterCore::may_be_back(int64_t now_us) const {
  const Role missing = registry_.has_healthy(Role::kDecode) ? Role::kPrefill : Role::kDecode;
  return std::any_of(registry_.workers().begin(), registry_.workers().end(), [&](const RegisteredWorker& worker) {
    return worker.role == missing && worker.membership == Membership::kServing && worker.down_since_us != 0 &&
           now_us < worker.down_since_us + options_.rescue_us;
  });
}

void RouterCore::retry_parked(int64_t now_us) {
  const std::vector<RequestId> parked(parked_.begin(), parked_.end());
  for (const RequestId id : parked) {
    const auto found = requests_.find(id);
    if (found == requests_.end() || !parked_.contains(id)) continue;
    Routed& routed = *found->second;
    perform(routed, pick_workers(routed, routed.legs.has_emitted(), now_us), now_us);
  }
}

void RouterCore::record_success(WorkerId id, int64_t now_us) {
  RegisteredWorker& worker = registry_.worker(id);
  if (worker.breaker.record(true, now_us)) {
    log_info("router", "{} worker {} serves again", role_name(worker.role), worker.url);
    metrics_->show(worker);
  }
  record_health(id, true, now_us);
}

// A failure of the request or of its time says nothing about a worker. One while blocks were handed over, told by a
// worker that answers, may be of the other or of the way between the two: then the pair is blamed, and both are left
// out of the next attempt.
void RouterCore::record_failure(const Leg& leg, Routed& routed, const LegFault& fault, int64_t now_us) {
  RegisteredWorker& worker = registry_.worker(leg.worker);
  metrics_->leg_failed(worker, fault.error.kind);
  if (fault.reached || fault.error.kind != ErrorKind::kDeadlineExceeded) {
    record_health(leg.worker, fault.reached, now_us);
  }
  const bool misfits = is_misfit(fault.error.kind, routed.legs.attempt().mode);
  if (!is_worker_fault(fault.error.kind) && !misfits) return;
  const bool is_between = misfits || (fault.reached && fault.error.kind != ErrorKind::kInternal && routed.legs.is_handing_over());
  if (is_between) {
    const Attempt& attempt = routed.legs.attempt();
    metrics_->pair_failures.add();
    registry_.record_pair(*attempt.prefill, attempt.decode, false, now_us);
    if (misfits) {
      log_error("router", "prefill worker {} and decode worker {} do not fit together: {}",
                registry_.worker(*attempt.prefill).url, registry_.worker(attempt.decode).url, fault.error.message);
    }
    routed.failed.emplace_back(*attempt.prefill, now_us);
    routed.failed.emplace_back(attempt.decode, now_us);
    return;
  }
  routed.failed.emplace_back(leg.worker, now_us);
  if (!worker.breaker.record(false, now_us)) return;
  log_warning("router", "{} worker {} is left out for {} s after {} failures in a row", role_name(worker.role),
              worker.url, options_.registry.breaker.open_us / 1'000'000, options_.registry.breaker.failures_to_open);
  metrics_->breaker_opened(worker);
  metrics_->show(worker);
}

void RouterCore::give_up_legs(WorkerId id, int64_t now_us) {
  std::vector<LegId> affected;
  for (const auto& [leg, entry] : legs_) {
    if (entry.worker == id) affected.push_back(leg);
  }
  std::sort(affected.begin(), affected.end());
  for (const LegId leg : affected) {
    if (!legs_.contains(leg)) continue;
    port_.cancel_leg(leg);
    leg_failed(leg,
               {.error = worker_unavailable(fmt::format("a worker has not answered its health probes for {} s",
                                                     options_.unresponsive_us / 1'000'000)),
                .reached = false,
                .died = true},
               now_us);
  }
}

}  // namespace tandem::router
