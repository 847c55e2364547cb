// Everything a router decides, without sockets, threads or a clock: which workers a request goes to, what happens when
// one fails, who waits and for how long. RoutedWorker binds it to HTTP and real time, tandem sim to a virtual network.
//
//   submit ──> [queue] ──> plan an attempt ──> legs ──events──> answer
//                              ^  │ nobody is there: park        │
//                              └──┴──── retry or migration <─────┘ worker at fault
//
// Events in: submit, cancel, what legs and probes say, tick. Actions out: LegPort, and each request's sink. Neither may
// call back into the core. All times are those of the caller's steady clock.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "src/base/metrics.h"
#include "src/engine/worker.h"
#include "src/router/registry.h"
#include "src/router/two_legs.h"

namespace tandem::router {

class RouterMetrics;

using LegId = StrongId<struct LegIdTag, uint64_t>;

struct LegOrder {
  LegId id;
  Role role = Role::kDecode;
  WorkerId worker;
  const engine::TokenRequest& request;  // during the call only
  const std::string& transfer;          // kv_transfer_params as JSON text, "" for none
  int64_t deadline_us = 0;
  bool publishes = false;  // its last word may be a publication (pull), which must not be lost when it is cancelled
};

class LegPort {
 public:
  virtual ~LegPort() = default;
  // What comes of it is told to the core by leg_…, later; after a failure or the finish nothing may follow.
  virtual void open_leg(const LegOrder& order) = 0;
  // The worker is told. What still comes is ignored, but for a publication that was on its way already: of that the
  // core is told by publication_unwanted.
  virtual void cancel_leg(LegId id) = 0;
  // Tells a worker that nobody comes for what it has published; `transfer` is the kv_transfer_params object that it
  // gave. Best effort, once; otherwise the lease ends it.
  virtual void release(WorkerId worker, const std::string& transfer) = 0;
};

struct CoreOptions {
  RegistryOptions registry{};
  std::string front_end{};  // which of several, for the metrics of what this one knows of workers; "": the only one
  bool pull = false;  // prefill first, for workers that are not Tandem
  // Requests may say themselves what their transfer is: this router spreads one role over ranks, another one has both.
  bool passes_transfers = false;
  Repeats repeats{.retries = 2, .migrations = 3};
  double retry_share = 0.2;         // of the requests that may be repeated (RetryBudget)
  bool enforce_disagg = false;      // never compute a prompt on a decode worker while there are prefill workers
  int64_t local_prompt_tokens = 0;  // prompts with at most this many uncached tokens are computed by decode
  int64_t max_requests = 4096;      // at workers
  int64_t queue_size = 4096;        // waiting for a place there; more are kResourceExhausted
  int64_t queue_timeout_us = 60'000'000;
  // A request waits this long for a worker to come back; a new one fails at once if nobody was there for as long.
  int64_t rescue_us = 10'000'000;
  int64_t request_timeout_us = 600'000'000;  // for requests that carry no earlier deadline
  // A killed process breaks its connections at once; a frozen or unreachable one does not. After this long without an
  // answer to a probe the legs at a worker are given up.
  int64_t unresponsive_us = 10'000'000;
};

class RouterCore {
 public:
  // A worker that failed a request gets it again after this long if nobody else is there.
  static constexpr int64_t kExcludedForUs = 2'000'000;
  // Legs end at the deadline by themselves; the core ends them this much later if they did not.
  static constexpr int64_t kDeadlineSlackUs = 100'000;

  // `port` and `metrics` must outlive this.
  RouterCore(CoreOptions options, LegPort& port, Registry& metrics);
  ~RouterCore();  // without cancelling anything
  RouterCore(const RouterCore&) = delete;
  RouterCore& operator=(const RouterCore&) = delete;

  // ---- Workers
  Result<WorkerId> add_worker(Role role, std::string url, int64_t weight = 1, int32_t rank = -1);
  // Takes no new request; what it has goes on.
  void drain_worker(WorkerId id);
  // Takes only requests that name it (TokenRequest::prefiller). Not one that has requests.
  void set_only_named(WorkerId id) { registry_.worker(id).only_named = true; }
  // invalid_argument unless a prefill worker is at "host:port", with the value and the remedy.
  Status check_prefiller(const std::string& host_port) const;
  const WorkerRegistry& workers() const { return registry_; }
  // An answer to a probe, or none in time. One that has answered that it is not well, as while it drains, gets nothing
  // new and keeps what it has.
  void probe_result(WorkerId id, bool success, int64_t now_us, bool has_answered = false);
  // What their owner knows counts like several probes: all are up, or down, from now on. Requests that waited for them
  // are spread over all.
  void set_health(std::span<const WorkerId> ids, bool is_up, int64_t now_us);
  // A decode worker, and where configured a prefill worker, is up.
  bool is_ready() const;

  // ---- Requests
  // `id` is the caller's, and larger than those before.
  void submit(RequestId id, engine::TokenRequest request, engine::EventSink sink, int64_t now_us);
  // No event follows. False if there is no such request.
  bool cancel(RequestId id, int64_t now_us);
  int64_t num_requests() const { return std::ssize(requests_); }
  int64_t num_waiting() const { return std::ssize(queue_) + std::ssize(parked_); }
  // Further attempts, and answers that went on elsewhere, so far.
  int64_t num_retries() const;
  int64_t num_migrations() const;

  // ---- Legs. Unknown ids are those of cancelled legs.
  void leg_reserved(LegId id, std::string transfer, int64_t now_us);
  void leg_event(LegId id, engine::TokenEvent event, int64_t now_us);  // decode: tokens, finish
  void leg_done(LegId id, std::string transfer, int64_t now_us);       // prefill
  void leg_failed(LegId id, LegFault fault, int64_t now_us);
  // A leg that was cancelled has published all the same.
  void publication_unwanted(WorkerId worker, const std::string& transfer);
  int64_t num_legs() const { return std::ssize(legs_); }

  // ---- Time
  void tick(int64_t now_us);
  int64_t next_tick_us() const;  // INT64_MAX: nothing to wait for

 private:
  // A parked request looks again this often: an exclusion or a breaker's rest may be over.
  static constexpr int64_t kParkedTickUs = 250'000;

  struct Routed;
  struct Leg {
    RequestId request;
    Role role;
    WorkerId worker;
  };

  // router_core.cc: the life of a request
  void start(Routed& routed, int64_t now_us);
  void perform(Routed& routed, LegActions actions, int64_t now_us);
  LegActions perform_one(Routed& routed, LegAction& action, int64_t now_us);
  LegActions pick_workers(Routed& routed, bool resumes, int64_t now_us);
  LegActions nobody_there(Routed& routed, Error error, int64_t now_us);
  void emit(Routed& routed, engine::TokenEvent event, int64_t now_us);
  void hand_on_reservation(LegId id, Routed& routed, const std::string& transfer, int64_t now_us);
  void count_after_failure(Routed& routed, const char* outcome);
  void close(Routed& routed, int64_t now_us);
  void admit_waiting(int64_t now_us);
  void open_leg(Routed& routed, Role role, WorkerId worker, const std::string& transfer);
  void cancel_leg(Routed& routed, Role role);
  Routed* take_leg(LegId id, bool last);
  void set_timer(Routed& routed, int64_t at_us);
  void expire(Routed& routed, int64_t now_us);
  static double seconds(int64_t us) { return static_cast<double>(us) * 1e-6; }

  // router_workers.cc: whom it goes to, and what is learnt
  bool needs_prompt_blocks() const;
  std::vector<WorkerId> excluded(const Routed& routed, int64_t now_us) const;
  Result<Attempt> plan_attempt(const Routed& routed, bool resumes, int64_t now_us);
  // Why decode shall compute this prompt itself; null: prefill shall.
  const char* local_reason(const Routed& routed, const PickContext& context) const;
  void take_load(Routed& routed, Role role, WorkerId worker);
  void release_load(Routed& routed, Role role);
  void release_loads(Routed& routed);
  WorkerId worker_of(LegId id) const;
  void record_success(WorkerId id, int64_t now_us);
  void record_failure(const Leg& leg, Routed& routed, const LegFault& fault, int64_t now_us);
  void record_health(WorkerId id, bool success, int64_t now_us);
  bool note_health(WorkerId id, bool success, int64_t now_us);
  // One of the role that nobody has now was up a moment ago.
  bool may_be_back(int64_t now_us) const;
  void retry_parked(int64_t now_us);
  void give_up_legs(WorkerId id, int64_t now_us);

  const CoreOptions options_;
  LegPort& port_;
  WorkerRegistry registry_;
  RetryBudget budget_;
  std::unique_ptr<RouterMetrics> metrics_;
  std::unordered_map<RequestId, std::unique_ptr<Routed>> requests_;
  std::set<RequestId> queue_;   // wait for a place among the started ones, oldest first
  std::set<RequestId> parked_;  // wait for a worker to come back
  std::unordered_map<LegId, Leg> legs_;
  std::set<std::pair<int64_t, RequestId>> timers_;  // at most one for each request
  int64_t num_started_ = 0;
  uint64_t next_leg_ = 1;
  bool is_admitting_ = false;
};

}  // namespace tandem::router
