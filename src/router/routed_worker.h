// The router's Worker: chooses a decode and a prefill worker for each request and binds its TwoLegs to HTTP.
// Its state belongs to one thread, that of the io_context; submit, cancel and the getters may be called from any.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "src/api/http_client.h"
#include "src/base/metrics.h"
#include "src/engine/worker.h"
#include "src/router/health_prober.h"
#include "src/router/registry.h"
#include "src/router/remote_worker.h"
#include "src/router/two_legs.h"

namespace boost::asio {
class io_context;
}

namespace tandem::router {

struct RouterOptions {
  std::vector<std::string> prefill_urls{};  // none: decode workers compute their prompts themselves
  std::vector<std::string> decode_urls{};   // at least one
  bool pull = false;                        // prefill first, for workers that are not Tandem
  PolicyKind policy = PolicyKind::kLeastLoad;
  int max_retries = 2;
  int64_t max_requests = 4096;                         // in flight; more are kResourceExhausted
  std::chrono::milliseconds request_timeout{600'000};  // for requests that carry no earlier deadline
  std::chrono::milliseconds probe_interval{1'000};
  std::string worker_api_key{};
};

class RoutedWorker final : public engine::Worker {
 public:
  // Faults: a URL that cannot be read, no decode worker, the same URL twice.
  static Result<std::unique_ptr<RoutedWorker>> create(boost::asio::io_context& io, RouterOptions options,
                                                      Registry& metrics);
  // Only when the io_context is stopped or on its thread. Cancels everything.
  ~RoutedWorker() override;

  RequestId submit(engine::TokenRequest request, engine::EventSink sink) override;
  void cancel(RequestId id) override;

  // A decode worker, and where configured a prefill worker, is up.
  bool is_ready() const { return ready_.load(std::memory_order_relaxed); }
  int64_t num_requests() const { return num_requests_.load(std::memory_order_relaxed); }

 private:
  struct Routed;
  struct WorkerGauges {
    Gauge* up;
    Gauge* requests;
    Gauge* tokens;
  };

  RoutedWorker(boost::asio::io_context& io, RouterOptions options, Registry& metrics);
  Status add_workers();

  void begin(RequestId id, engine::TokenRequest request, engine::EventSink sink);
  void perform(RequestId id, LegActions actions);
  LegActions perform_one(RequestId id, Routed& routed, LegAction& action);
  LegActions pick_workers(Routed& routed, const PickWorkers& pick);
  LegActions start_decode(RequestId id, Routed& routed, StartDecode& start);
  LegActions start_prefill(RequestId id, Routed& routed, StartPrefill& start);
  void emit(Routed& routed, engine::TokenEvent event);
  void close_if_done(RequestId id);
  // The request if its present attempt is `attempt`; events of an earlier attempt are dropped.
  Routed* find(RequestId id, int attempt);

  bool cancel_now(RequestId id);  // false if there is no such request
  void record_leg(WorkerId worker, const Error* error, bool reached);
  void give_up_legs(WorkerId worker);
  void update_readiness();
  void release_loads(Routed& routed);
  void update_load(const Routed& routed);
  void count_outcome(const char* outcome);

  boost::asio::io_context& io_;
  RouterOptions options_;
  Registry& metrics_;
  Counter& retries_;
  api::HttpClient client_;
  WorkerRegistry registry_;
  std::vector<std::unique_ptr<RemoteWorker>> remotes_;  // by worker id
  std::vector<WorkerGauges> gauges_;                    // by worker id
  std::unique_ptr<HealthProber> prober_;
  std::unordered_map<RequestId, std::unique_ptr<Routed>> requests_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);  // false once destroyed; posted work checks it
  std::atomic<uint64_t> next_id_{1};
  std::atomic<int64_t> num_requests_{0};
  std::atomic<bool> ready_{false};
};

}  // namespace tandem::router
