// Asks every worker's /health in turn and keeps the registry's health current. One thread: that of the io_context.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

#include "src/api/http_client.h"
#include "src/router/registry.h"

namespace boost::asio {
class io_context;
}

namespace tandem::router {

struct ProberHandlers {
  std::function<void(WorkerId)> on_change;  // health() of a worker has changed
  std::function<void(WorkerId)>
      on_unresponsive;  // probes have failed for kUnresponsiveAfter; called at each further one
};

class HealthProber {
 public:
  // A worker whose process is gone breaks its connections at once; one that is frozen or cut off does not. After this
  // long without an answer the requests it holds are given up.
  static constexpr std::chrono::seconds kUnresponsiveAfter{10};

  // `client` and `registry` must outlive this.
  HealthProber(boost::asio::io_context& io, api::HttpClient& client, WorkerRegistry& registry,
               std::chrono::milliseconds interval, ProberHandlers handlers);
  ~HealthProber();

  void start();  // for the workers registered so far
  // The outcome of a request tells as much as a probe.
  void record_outcome(WorkerId worker, bool success);

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace tandem::router
