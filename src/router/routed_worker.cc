#include "src/router/routed_worker.h"

#include <algorithm>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <deque>
#include <set>

#include "src/base/clock.h"
#include "src/base/log.h"

namespace tandem::router {

namespace asio = boost::asio;

// One request in flight.
struct RoutedWorker::Routed {
  engine::TokenRequest request;
  engine::EventSink sink;
  TwoLegs legs;
  int64_t deadline_us = 0;
  WorkerId decode{-1};
  WorkerId prefill{-1};
  api::CallId decode_call{};
  api::CallId prefill_call{};
  LoadToken decode_load{};
  LoadToken prefill_load{};

  // Rounded up, so that a leg never believes that time is left which is not.
  int64_t remaining_ms() const { return std::max<int64_t>(1, (deadline_us - SteadyClock().now_us() + 999) / 1000); }
  int64_t prompt_tokens() const { return static_cast<int64_t>(request.prompt.size()); }
};

Result<std::unique_ptr<RoutedWorker>> RoutedWorker::create(asio::io_context& io, RouterOptions options,
                                                           Registry& metrics) {
  std::unique_ptr<RoutedWorker> router(new RoutedWorker(io, std::move(options), metrics));
  TANDEM_TRY(router->add_workers());
  router->prober_->start();
  return router;
}

RoutedWorker::RoutedWorker(asio::io_context& io, RouterOptions options, Registry& metrics)
    : io_(io),
      options_(std::move(options)),
      metrics_(metrics),
      retries_(metrics.counter("tandem:router_retries_total", "Further attempts after a worker failed.")),
      client_(io, {}),
      registry_(options_.policy) {
  prober_ =
      std::make_unique<HealthProber>(io_, client_, registry_, options_.probe_interval,
                                     ProberHandlers{.on_change = [this](WorkerId) { update_readiness(); },
                                                    .on_unresponsive = [this](WorkerId id) { give_up_legs(id); }});
}

RoutedWorker::~RoutedWorker() { *alive_ = false; }

Status RoutedWorker::add_workers() {
  if (options_.decode_urls.empty()) {
    return invalid_argument("decode", "no decode worker is given; name at least one with --decode URL");
  }
  std::set<std::string> seen;
  for (const Role role : {Role::kPrefill, Role::kDecode}) {
    for (const std::string& text : role == Role::kPrefill ? options_.prefill_urls : options_.decode_urls) {
      TANDEM_ASSIGN(api::HttpUrl url, api::parse_http_url(text));
      if (!seen.insert(url.origin() + url.path).second) {
        return invalid_argument(role_name(role), "worker {} is given twice", text);
      }
      registry_.add(role, text);
      const MetricLabels labels = {{"worker", text}, {"role", role_name(role)}};
      gauges_.push_back(
          {.up = &metrics_.gauge("tandem:router_worker_up", "1 if the worker takes requests.", labels),
           .requests = &metrics_.gauge("tandem:router_worker_requests", "Requests in flight at a worker.", labels),
           .tokens = &metrics_.gauge("tandem:router_worker_tokens", "Tokens in flight at a worker.", labels)});
      remotes_.push_back(std::make_unique<RemoteWorker>(client_, std::move(url), options_.worker_api_key));
    }
  }
  update_readiness();
  return {};
}

RequestId RoutedWorker::submit(engine::TokenRequest request, engine::EventSink sink) {
  const RequestId id(next_id_.fetch_add(1, std::memory_order_relaxed));
  asio::post(io_, [this, alive = alive_, id, request = std::move(request), sink = std::move(sink)]() mutable {
    if (*alive) begin(id, std::move(request), std::move(sink));
  });
  return id;
}

void RoutedWorker::cancel(RequestId id) {
  asio::dispatch(io_, [this, alive = alive_, id] {
    // Called on our own thread this overtakes the posted begin(); a second try then comes after it.
    if (*alive && !cancel_now(id))
      asio::post(io_, [this, alive, id] {
        if (*alive) cancel_now(id);
      });
  });
}

bool RoutedWorker::cancel_now(RequestId id) {
  const auto found = requests_.find(id);
  if (found == requests_.end()) return false;
  if (!found->second->legs.is_answered()) count_outcome("cancelled");
  perform(id, found->second->legs.cancel());
  return true;
}

void RoutedWorker::begin(RequestId id, engine::TokenRequest request, engine::EventSink sink) {
  std::optional<Error> refusal;
  if (request.kv_transfer) {
    refusal = invalid_argument("kv_transfer_params", "kv_transfer_params may not be given to a router; ask a worker");
  } else if (std::ssize(requests_) >= options_.max_requests) {
    refusal = make_error(ErrorKind::kResourceExhausted, "{} requests are in flight, the most this router takes",
                         options_.max_requests);
  }
  const bool pairs = !options_.prefill_urls.empty();
  const LegMode mode = !pairs ? LegMode::kPlain : options_.pull ? LegMode::kPull : LegMode::kPush;
  auto routed = std::make_unique<Routed>(
      Routed{.request = std::move(request), .sink = std::move(sink), .legs = TwoLegs(mode, options_.max_retries)});
  if (refusal) {
    engine::TokenEvent event;
    event.error = std::move(*refusal);
    return emit(*routed, std::move(event));
  }
  const int64_t latest_us = SteadyClock().now_us() + options_.request_timeout.count() * 1000;
  routed->deadline_us = routed->request.deadline_us > 0 ? std::min(routed->request.deadline_us, latest_us) : latest_us;
  LegActions actions = routed->legs.start();
  requests_.emplace(id, std::move(routed));
  num_requests_.store(std::ssize(requests_), std::memory_order_relaxed);
  perform(id, std::move(actions));
}

// Carries out actions in order; those that an action brings about follow.
void RoutedWorker::perform(RequestId id, LegActions actions) {
  const auto found = requests_.find(id);
  CHECK(found != requests_.end());
  Routed& routed = *found->second;
  std::deque<LegAction> pending(std::make_move_iterator(actions.begin()), std::make_move_iterator(actions.end()));
  while (!pending.empty()) {
    LegAction action = std::move(pending.front());
    pending.pop_front();
    for (LegAction& next : perform_one(id, routed, action)) pending.push_back(std::move(next));
  }
  close_if_done(id);
}

LegActions RoutedWorker::perform_one(RequestId id, Routed& routed, LegAction& action) {
  if (const PickWorkers* pick = std::get_if<PickWorkers>(&action)) return pick_workers(routed, *pick);
  if (StartDecode* start = std::get_if<StartDecode>(&action)) return start_decode(id, routed, *start);
  if (StartPrefill* start = std::get_if<StartPrefill>(&action)) return start_prefill(id, routed, *start);
  if (EmitEvent* event = std::get_if<EmitEvent>(&action)) emit(routed, std::move(event->event));
  if (std::get_if<CancelDecode>(&action)) client_.cancel(routed.decode_call);
  if (std::get_if<CancelPrefill>(&action)) client_.cancel(routed.prefill_call);
  return {};
}

LegActions RoutedWorker::pick_workers(Routed& routed, const PickWorkers& pick) {
  const bool is_retry = routed.legs.attempts() > 0;
  release_loads(routed);  // of a failed attempt
  const Result<WorkerId> decode = registry_.pick(Role::kDecode, routed.legs.excluded());
  if (!decode.ok()) return routed.legs.none_available(decode.error());
  std::optional<WorkerId> prefill;
  if (pick.needs_prefill) {
    const Result<WorkerId> chosen = registry_.pick(Role::kPrefill, routed.legs.excluded());
    if (!chosen.ok()) return routed.legs.none_available(chosen.error());
    prefill = *chosen;
  }
  if (is_retry) {
    retries_.add();
    log_warning("router", "[{}] attempt {} on other workers", routed.request.external_id, routed.legs.attempts() + 1);
  }
  routed.decode = *decode;
  routed.prefill = prefill.value_or(WorkerId(-1));
  routed.decode_load = registry_.acquire(*decode, routed.prompt_tokens());
  if (prefill) routed.prefill_load = registry_.acquire(*prefill, routed.prompt_tokens());
  update_load(routed);
  return routed.legs.picked(*decode, prefill);
}

LegActions RoutedWorker::start_decode(RequestId id, Routed& routed, StartDecode& start) {
  const int attempt = routed.legs.attempts();
  DecodeHandlers handlers;
  handlers.on_reserved = [this, id, attempt](std::string transfer) {
    if (Routed* live = find(id, attempt)) perform(id, live->legs.decode_reserved(std::move(transfer)));
  };
  handlers.on_event = [this, id, attempt, worker = start.worker](engine::TokenEvent&& event) {
    Routed* live = find(id, attempt);
    if (live == nullptr) return;
    live->decode_load.grow(std::ssize(event.tokens));
    if (event.finish) {
      live->decode_load.release();
      update_load(*live);
      record_leg(worker, nullptr, true);
    }
    perform(id, live->legs.decode_event(std::move(event)));
  };
  handlers.on_failed = [this, id, attempt, worker = start.worker](Error error, bool reached) {
    Routed* live = find(id, attempt);
    if (live == nullptr) return;
    client_.cancel(live->decode_call);  // an error inside the stream does not end the connection
    live->decode_load.release();
    update_load(*live);
    record_leg(worker, &error, reached);
    perform(id, live->legs.decode_failed(std::move(error)));
  };
  routed.decode_call = remotes_[static_cast<size_t>(start.worker.value)]->start_decode(
      {routed.request, std::move(start.transfer), routed.remaining_ms()}, std::move(handlers));
  return {};
}

LegActions RoutedWorker::start_prefill(RequestId id, Routed& routed, StartPrefill& start) {
  const int attempt = routed.legs.attempts();
  PrefillHandlers handlers;
  handlers.on_done = [this, id, attempt, worker = start.worker](std::string transfer) {
    Routed* live = find(id, attempt);
    if (live == nullptr) return;
    live->prefill_load.release();
    update_load(*live);
    record_leg(worker, nullptr, true);
    perform(id, live->legs.prefill_done(std::move(transfer)));
  };
  handlers.on_failed = [this, id, attempt, worker = start.worker](Error error, bool reached) {
    Routed* live = find(id, attempt);
    if (live == nullptr) return;
    live->prefill_load.release();
    update_load(*live);
    record_leg(worker, &error, reached);
    perform(id, live->legs.prefill_failed(std::move(error)));
  };
  routed.prefill_call = remotes_[static_cast<size_t>(start.worker.value)]->start_prefill(
      {routed.request, std::move(start.transfer), routed.remaining_ms()}, std::move(handlers));
  return {};
}

void RoutedWorker::emit(Routed& routed, engine::TokenEvent event) {
  if (event.error || event.finish) {
    count_outcome(event.error ? error_kind_name(event.error->kind) : "ok");
    if (event.error) log_warning("router", "[{}] {}", routed.request.external_id, event.error->message);
  }
  routed.sink(std::move(event));
}

void RoutedWorker::close_if_done(RequestId id) {
  const auto found = requests_.find(id);
  if (found == requests_.end() || !found->second->legs.is_closed()) return;
  release_loads(*found->second);
  requests_.erase(found);
  num_requests_.store(std::ssize(requests_), std::memory_order_relaxed);
}

RoutedWorker::Routed* RoutedWorker::find(RequestId id, int attempt) {
  const auto found = requests_.find(id);
  if (found == requests_.end() || found->second->legs.attempts() != attempt) return nullptr;
  return found->second.get();
}

void RoutedWorker::record_leg(WorkerId worker, const Error* error, bool reached) {
  if (error != nullptr) {
    const RegisteredWorker& entry = registry_.worker(worker);
    metrics_
        .counter("tandem:router_leg_failures_total", "Failed legs by worker and cause.",
                 {{"worker", entry.url}, {"role", role_name(entry.role)}, {"cause", error_kind_name(error->kind)}})
        .add();
  }
  // A passed deadline tells about the request, not about the worker; any answer tells that the worker lives.
  if (reached || error->kind != ErrorKind::kDeadlineExceeded) prober_->record_outcome(worker, reached);
}

void RoutedWorker::give_up_legs(WorkerId worker) {
  std::vector<RequestId> affected;
  for (const auto& [id, routed] : requests_) {
    if (routed->decode == worker || routed->prefill == worker) affected.push_back(id);
  }
  for (const RequestId id : affected) {
    Routed& routed = *requests_.at(id);
    const Error error = make_error(ErrorKind::kUnavailable, "a worker has not answered its health probes for {} s",
                                   HealthProber::kUnresponsiveAfter.count());
    if (routed.decode == worker) {
      client_.cancel(routed.decode_call);
      routed.decode_load.release();
      perform(id, routed.legs.decode_failed(error));
    } else {
      client_.cancel(routed.prefill_call);
      routed.prefill_load.release();
      perform(id, routed.legs.prefill_failed(error));
    }
  }
}

void RoutedWorker::update_readiness() {
  const bool ready = registry_.has_healthy(Role::kDecode) &&
                     (!registry_.has_role(Role::kPrefill) || registry_.has_healthy(Role::kPrefill));
  ready_.store(ready, std::memory_order_relaxed);
  for (const RegisteredWorker& worker : registry_.workers()) {
    gauges_[static_cast<size_t>(worker.id.value)].up->set(worker.tracker.health() == Health::kUp ? 1 : 0);
  }
}

void RoutedWorker::release_loads(Routed& routed) {
  routed.decode_load.release();
  routed.prefill_load.release();
  update_load(routed);
}

void RoutedWorker::update_load(const Routed& routed) {
  for (const WorkerId id : {routed.decode, routed.prefill}) {
    if (id.value < 0) continue;
    const WorkerLoad& load = *registry_.worker(id).load;
    WorkerGauges& gauges = gauges_[static_cast<size_t>(id.value)];
    gauges.requests->set(static_cast<double>(load.requests));
    gauges.tokens->set(static_cast<double>(load.tokens));
  }
}

void RoutedWorker::count_outcome(const char* outcome) {
  metrics_.counter("tandem:router_requests_total", "Requests by how they ended.", {{"outcome", outcome}}).add();
}

}  // namespace tandem::router
