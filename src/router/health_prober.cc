#include "src/router/health_prober.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <map>

#include "src/base/log.h"

namespace tandem::router {

namespace asio = boost::asio;
using SteadyTime = std::chrono::steady_clock::time_point;

struct HealthProber::Impl : std::enable_shared_from_this<HealthProber::Impl> {
  struct Probe {
    explicit Probe(asio::io_context& io) : timer(io) {}
    asio::steady_timer timer;
    api::HttpUrl url;
    api::CallId call;
    SteadyTime first_failure{};  // of the present run of failures
  };

  asio::io_context& io;
  api::HttpClient& client;
  WorkerRegistry& registry;
  std::chrono::milliseconds interval;
  ProberHandlers handlers;
  std::map<WorkerId, Probe> probes;
  bool stopped = false;

  Impl(asio::io_context& context, api::HttpClient& http, WorkerRegistry& workers, std::chrono::milliseconds every,
       ProberHandlers to_call)
      : io(context), client(http), registry(workers), interval(every), handlers(std::move(to_call)) {}

  void ask(WorkerId id) {
    Probe& probe = probes.at(id);
    api::ClientRequest request;
    request.target = "/health";
    request.connect_timeout = request.idle_timeout = request.total_timeout = interval;
    probe.call = client.start(probe.url, std::move(request),
                              {.on_done = [self = shared_from_this(), id](Result<api::ClientResponse> response) {
                                if (self->stopped) return;
                                self->take(id, response.ok() && response->is_success());
                                self->ask_later(id);
                              }});
  }

  // A worker that is out is asked four times as often, so that it is back soon after it has recovered.
  void ask_later(WorkerId id) {
    Probe& probe = probes.at(id);
    const bool is_up = registry.worker(id).tracker.health() == Health::kUp;
    probe.timer.expires_after(is_up ? interval : interval / 4);
    probe.timer.async_wait([self = shared_from_this(), id](const boost::system::error_code& error) {
      if (!error && !self->stopped) self->ask(id);
    });
  }

  void take(WorkerId id, bool success) {
    Probe& probe = probes.at(id);
    const SteadyTime now = std::chrono::steady_clock::now();
    if (success) {
      probe.first_failure = {};
    } else if (probe.first_failure == SteadyTime{}) {
      probe.first_failure = now;
    }
    record(id, success);
    if (!success && now - probe.first_failure >= kUnresponsiveAfter) handlers.on_unresponsive(id);
  }

  void record(WorkerId id, bool success) {
    RegisteredWorker& worker = registry.worker(id);
    if (!worker.tracker.record(success)) return;
    log_info("router", "{} worker {} is {}", role_name(worker.role), worker.url,
             worker.tracker.health() == Health::kUp ? "up" : "down");
    handlers.on_change(id);
  }
};

HealthProber::HealthProber(asio::io_context& io, api::HttpClient& client, WorkerRegistry& registry,
                           std::chrono::milliseconds interval, ProberHandlers handlers)
    : impl_(std::make_shared<Impl>(io, client, registry, interval, std::move(handlers))) {}

HealthProber::~HealthProber() {
  impl_->stopped = true;
  for (auto& [id, probe] : impl_->probes) {
    probe.timer.cancel();
    impl_->client.cancel(probe.call);
  }
}

void HealthProber::start() {
  for (const RegisteredWorker& worker : impl_->registry.workers()) {
    Impl::Probe& probe = impl_->probes.try_emplace(worker.id, impl_->io).first->second;
    probe.url = api::parse_http_url(worker.url).value();  // checked when it was registered
    impl_->ask(worker.id);
  }
}

void HealthProber::record_outcome(WorkerId worker, bool success) { impl_->record(worker, success); }

}  // namespace tandem::router
