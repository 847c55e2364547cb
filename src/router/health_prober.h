// Asks every worker's /health in turn. One thread: that of the io_context.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

#include "src/api/http_client.h"
#include "src/router/policy.h"

namespace boost::asio {
class io_context;
}

namespace tandem::router {

class HealthProber {
 public:
  // (worker, it is well, it has answered): one that drains answers that it takes no more requests.
  using Told = std::function<void(WorkerId, bool, bool)>;
  // `on_result` is told each answer, or that none came in time. `client` must outlive this.
  HealthProber(boost::asio::io_context& io, api::HttpClient& client, std::chrono::milliseconds interval,
               Told on_result);
  ~HealthProber();

  void watch(WorkerId worker, const api::HttpUrl& url);
  void forget(WorkerId worker);

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace tandem::router
