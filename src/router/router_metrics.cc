#include "src/router/router_metrics.h"

#include <string_view>

namespace tandem::router {
namespace {

constexpr const char* kRequests = "tandem:router_requests_total";
constexpr const char* kRequestsHelp = "Requests by how they ended.";

MetricLabels labels_of(const RegisteredWorker& worker) {
  return {{"worker", worker.url}, {"role", role_name(worker.role)}};
}

}  // namespace

RouterMetrics::RouterMetrics(Registry& registry, std::string front_end)
    : retries(registry.counter("tandem:router_retries_total", "Further attempts after a worker failed.")),
      migrations(registry.counter("tandem:router_migrations_total",
                                  "Answers that went on at another worker in the middle of their stream.")),
      pair_failures(registry.counter("tandem:router_pair_failures_total",
                                     "Attempts that failed between a prefill and a decode worker which both answer.")),
      released_publications(registry.counter("tandem:router_released_publications_total",
                                             "Publications (pull) that nobody came for, of which a worker was told.")),
      queue_seconds(registry.histogram("tandem:router_queue_seconds", "From arrival to the first attempt.",
                                       request_latency_buckets())),
      reserve_seconds(registry.histogram("tandem:router_reserve_seconds",
                                         "From an attempt to decode's reservation of KV blocks.",
                                         time_to_first_token_buckets())),
      prefill_seconds(registry.histogram("tandem:router_prefill_seconds",
                                         "From the reservation to prefill's answer, its queue included.",
                                         time_to_first_token_buckets())),
      handover_seconds(registry.histogram("tandem:router_handover_seconds",
                                          "From prefill's answer to decode's first token, if it came later.",
                                          time_to_first_token_buckets())),
      first_token_seconds(registry.histogram("tandem:router_first_token_seconds",
                                             "From arrival to the first token, all attempts included.",
                                             time_to_first_token_buckets())),
      registry_(registry),
      front_end_(std::move(front_end)),
      ok_(registry.counter(kRequests, kRequestsHelp, {{"outcome", "ok"}})) {}

void RouterMetrics::add_worker(const RegisteredWorker& worker) {
  if (static_cast<size_t>(worker.id.value) < workers_.size()) return;
  CHECK_EQ(std::ssize(workers_), worker.id.value);
  MetricLabels labels = labels_of(worker);
  if (!front_end_.empty()) labels.emplace_back("api_server", front_end_);
  workers_.push_back(
      {.up = &registry_.gauge("tandem:router_worker_up", "1 if the worker answers its probes and is not removed.", labels),
       .left_out = &registry_.gauge("tandem:router_worker_left_out",
                                    "1 after failures in a row: others are preferred until a request succeeds there.",
                                    labels),
       .requests = &registry_.gauge("tandem:router_worker_requests", "Requests in flight at a worker.", labels),
       .tokens = &registry_.gauge("tandem:router_worker_tokens", "Tokens in flight at a worker.", labels)});
}

void RouterMetrics::show(const RegisteredWorker& worker) {
  const WorkerGauges& gauges = workers_.at(static_cast<size_t>(worker.id.value));
  const bool is_up = worker.membership == Membership::kServing && worker.tracker.health() == Health::kUp;
  gauges.up->set(is_up ? 1 : 0);
  gauges.left_out->set(worker.breaker.is_closed() ? 0 : 1);
  gauges.requests->set(static_cast<double>(worker.load->requests));
  gauges.tokens->set(static_cast<double>(worker.load->tokens));
}

void RouterMetrics::leg_failed(const RegisteredWorker& worker, ErrorKind kind) {
  MetricLabels labels = labels_of(worker);
  labels.emplace_back("cause", error_kind_name(kind));
  registry_.counter("tandem:router_leg_failures_total", "Failed legs by worker and cause.", labels).add();
}

void RouterMetrics::after_failure(const RegisteredWorker& worker, ErrorKind cause, const char* outcome) {
  MetricLabels labels = labels_of(worker);
  labels.emplace_back("cause", error_kind_name(cause));
  labels.emplace_back("outcome", outcome);
  registry_.counter("tandem:router_after_failure_total",
                    "Requests whose leg failed at a worker, by what became of them.",
                    labels)
      .add();
}

void RouterMetrics::outcome(const char* how) {
  if (std::string_view(how) == "ok") return ok_.add();
  registry_.counter(kRequests, kRequestsHelp, {{"outcome", how}}).add();
}

void RouterMetrics::local(const char* reason) {
  registry_
      .counter("tandem:router_local_prompts_total", "Prompts that decode computed although there are prefill workers.",
               {{"reason", reason}})
      .add();
}

void RouterMetrics::breaker_opened(const RegisteredWorker& worker) {
  registry_
      .counter("tandem:router_breaker_opened_total", "Times a worker was left out after failures in a row.",
               labels_of(worker))
      .add();
}

}  // namespace tandem::router
