// The router's Worker: a RouterCore on real sockets and real time. It reaches workers over HTTP, a RemoteWorker each.
// Its state belongs to one thread, that of the io_context; submit, cancel and the getters may be called from any.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "src/api/http_client.h"
#include "src/base/clock.h"
#include "src/base/metrics.h"
#include "src/base/trace.h"
#include "src/engine/worker.h"
#include "src/router/health_prober.h"
#include "src/router/remote_worker.h"
#include "src/router/router_core.h"

namespace tandem::router {

// A worker's URL and, after '#', its weight for weighted_round_robin: "http://10.0.0.1:8200#3".
struct WorkerAddress {
  std::string url;
  int64_t weight = 1;
};
// Faults: no URL, or a weight that is not 1 … 1000.
Result<WorkerAddress> parse_worker_address(const std::string& text);

struct RouterOptions {
  std::vector<std::string> prefill_urls{};  // none: decode workers compute their prompts themselves
  std::vector<std::string> named_prefill_urls{};  // take only requests that name them
  std::vector<std::string> decode_urls{};   // at least one, unless workers come and go (add_worker)
  bool may_begin_without_workers = false;
  CoreOptions core{};
  std::chrono::milliseconds probe_interval{1'000};
  std::string worker_api_key{};
  SpanSink* spans = nullptr;  // null: legs are not traced
};

class RoutedWorker final : public engine::Worker, private LegPort {
 public:
  // Faults: a URL that cannot be read, no decode worker, the same URL twice.
  static Result<std::unique_ptr<RoutedWorker>> create(boost::asio::io_context& io, RouterOptions options,
                                                      Registry& metrics);
  // Only when the io_context is stopped or on its thread. Cancels everything.
  ~RoutedWorker() override;

  RequestId submit(engine::TokenRequest request, engine::EventSink sink) override;
  void cancel(RequestId id) override;
  // Which worker has published it is not known: all are told, and those that do not know the handle do nothing.
  void release(const transfer::KvTransferParams& publication) override;

  // A decode worker, and where prompts may not be computed there a prefill worker, is up.
  bool is_ready() const { return ready_.load(std::memory_order_relaxed); }
  int64_t num_requests() const { return num_requests_.load(std::memory_order_relaxed); }

  // On the thread of the io_context. A worker that is removed ends the requests it has.
  Result<WorkerId> add_worker(Role role, const std::string& address, int32_t rank = -1);
  Status remove_worker(WorkerId id);
  // On the thread of the io_context: RouterCore::check_prefiller.
  Status check_prefiller(const std::string& host_port) const { return core_.check_prefiller(host_port); }
  // On the thread of the io_context: RouterCore::set_health.
  void set_health(std::span<const WorkerId> ids, bool is_up);
  const WorkerRegistry& workers() const { return core_.workers(); }

 private:
  // More releases at a time are not sent: their publications end with their leases.
  static constexpr int64_t kMaxReleases = 256;
  // For an answer that crosses the cancel of its leg.
  static constexpr std::chrono::milliseconds kLeaveTimeout{1'000};

  RoutedWorker(boost::asio::io_context& io, RouterOptions options, Registry& metrics);

  void open_leg(const LegOrder& order) override;
  void cancel_leg(LegId id) override;
  void release(WorkerId worker, const std::string& transfer) override;
  api::CallId open_decode(LegId id, WorkerId worker, const LegRequest& leg);
  api::CallId open_prefill(LegId id, WorkerId worker, const LegRequest& leg);
  // The call of a leg, which is over.
  api::CallId end_leg(LegId id, std::string error);
  // After everything that was told to the core.
  void settle();
  void arm_timer();
  int64_t now_us() const { return clock_.now_us(); }

  boost::asio::io_context& io_;
  const RouterOptions options_;
  const SteadyClock clock_;
  api::HttpClient client_;
  RouterCore core_;
  HealthProber prober_;
  std::vector<std::unique_ptr<RemoteWorker>> remotes_;  // by worker id
  struct Leg {
    api::CallId call;
    Span span;
    bool publishes = false;
  };
  std::unordered_map<LegId, Leg> legs_;
  struct Timer;
  std::unique_ptr<Timer> timer_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);  // false once destroyed; posted work checks it
  int64_t num_releases_ = 0;  // under way
  std::atomic<uint64_t> next_id_{1};
  std::atomic<int64_t> num_requests_{0};
  std::atomic<bool> ready_{false};
};

}  // namespace tandem::router
