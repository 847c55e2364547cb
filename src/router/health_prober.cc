#include "src/router/health_prober.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <map>
#include <utility>

namespace tandem::router {

namespace asio = boost::asio;

struct HealthProber::Impl : std::enable_shared_from_this<HealthProber::Impl> {
  struct Probe {
    explicit Probe(asio::io_context& io) : timer(io) {}
    asio::steady_timer timer;
    api::HttpUrl url;
    api::CallId call;
  };

  asio::io_context& io;
  api::HttpClient& client;
  std::chrono::milliseconds interval;
  HealthProber::Told on_result;
  std::map<WorkerId, Probe> probes;

  Impl(asio::io_context& context, api::HttpClient& http, std::chrono::milliseconds every,
       HealthProber::Told to_tell)
      : io(context), client(http), interval(every), on_result(std::move(to_tell)) {}

  void ask(WorkerId id) {
    Probe& probe = probes.at(id);
    api::ClientRequest request;
    request.target = "/health";
    request.connect_timeout = request.idle_timeout = request.total_timeout = interval;
    probe.call = client.start(probe.url, std::move(request),
                              {.on_done = [self = shared_from_this(), id](Result<api::ClientResponse> response) {
                                if (!self->probes.contains(id)) return;
                                const bool success = response.ok() && response->is_success();
                                self->ask_later(id, success);
                                self->on_result(id, success, response.ok());
                              }});
  }

  // A worker that does not answer is asked four times as often, so that it is back soon after it has recovered.
  void ask_later(WorkerId id, bool success) {
    Probe& probe = probes.at(id);
    probe.timer.expires_after(success ? interval : interval / 4);
    probe.timer.async_wait([self = shared_from_this(), id](const boost::system::error_code& error) {
      if (!error && self->probes.contains(id)) self->ask(id);
    });
  }

  void forget(WorkerId id) {
    const auto found = probes.find(id);
    if (found == probes.end()) return;
    client.cancel(found->second.call);
    probes.erase(found);  // its timer with it
  }
};

HealthProber::HealthProber(asio::io_context& io, api::HttpClient& client, std::chrono::milliseconds interval,
                           Told on_result)
    : impl_(std::make_shared<Impl>(io, client, interval, std::move(on_result))) {}

HealthProber::~HealthProber() {
  while (!impl_->probes.empty()) impl_->forget(impl_->probes.begin()->first);
}

void HealthProber::watch(WorkerId worker, const api::HttpUrl& url) {
  impl_->forget(worker);
  Impl::Probe& probe = impl_->probes.try_emplace(worker, impl_->io).first->second;
  probe.url = url;
  impl_->ask(worker);
}

void HealthProber::forget(WorkerId worker) { impl_->forget(worker); }

}  // namespace tandem::router
