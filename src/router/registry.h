// The workers a router knows: address, health, breakers and load. No sockets and no clock of its own; one thread.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/base/result.h"
#include "src/router/breaker.h"
#include "src/router/policy.h"
#include "src/router/prefix_index.h"

namespace tandem::router {

enum class Role : uint8_t { kPrefill, kDecode };
const char* role_name(Role role);  // "prefill", "decode"

// Error::code of what befalls a request because a worker is away. The kind is kUnavailable: try again.
inline constexpr const char* kWorkerUnavailable = "worker_unavailable";
Error worker_unavailable(std::string message);

enum class Health : uint8_t { kUnknown, kUp, kDown };

// Two failures in a row take a worker out, two successes bring it back. A worker never heard of needs one success.
// Probes and the outcomes of requests count alike, so a dead worker is left out before its next probe.
class HealthTracker {
 public:
  static constexpr int kFailuresToDown = 2;
  static constexpr int kSuccessesToUp = 2;

  // True if health() changed.
  bool record(bool success);
  Health health() const { return health_; }

 private:
  Health health_ = Health::kUnknown;
  int streak_ = 0;  // of successes (> 0) or failures (< 0)
};

struct WorkerLoad {
  int64_t requests = 0;
  int64_t tokens = 0;  // prompt tokens, and generated ones on decode workers
};

// One request's share of a worker's load. The share ends with the token, however the request ended.
class LoadToken {
 public:
  LoadToken() = default;
  LoadToken(std::shared_ptr<WorkerLoad> load, int64_t tokens);
  LoadToken(LoadToken&& other) noexcept;
  LoadToken& operator=(LoadToken&& other) noexcept;
  ~LoadToken() { release(); }

  void grow(int64_t tokens);
  void release();

 private:
  std::shared_ptr<WorkerLoad> load_;
  int64_t tokens_ = 0;
};

// kServing takes requests; kDraining ends those it has and then becomes kRemoved, which can be added again.
enum class Membership : uint8_t { kServing, kDraining, kRemoved };

struct RegisteredWorker {
  RegisteredWorker(WorkerId worker, Role its_role, std::string address, int64_t its_weight, BreakerLimits limits)
      : id(worker), role(its_role), url(std::move(address)), weight(its_weight), breaker(limits) {}

  WorkerId id;
  Role role;
  std::string url;
  int64_t weight;
  int32_t rank = -1;  // in its rank group; -1: it is none
  bool only_named = false;  // takes requests that name it, and no others
  Membership membership = Membership::kServing;
  HealthTracker tracker;
  CircuitBreaker breaker;
  PrefixIndex prefixes;
  std::shared_ptr<WorkerLoad> load = std::make_shared<WorkerLoad>();
  int64_t down_since_us = 0;     // 0: it is up, or never was
  int64_t failing_since_us = 0;  // first of the present run of failed probes; 0: the last one succeeded
};

// What a choice depends on, besides the workers.
struct PickContext {
  int64_t now_us = 0;
  std::span<const WorkerId> excluded{};       // have failed this request
  std::span<const uint64_t> prompt_blocks{};  // hash_prompt_blocks
  uint64_t session = 0;                       // 0: none
  int32_t rank = -1;                          // the only rank that may be chosen; -1: any
  std::optional<WorkerId> named{};    // the only prefill worker that may be chosen
  std::optional<WorkerId> partner{};          // the decode worker that a prefill worker must reach
};

struct RegistryOptions {
  PolicyKind prefill_policy = PolicyKind::kLeastLoad;
  PolicyKind decode_policy = PolicyKind::kLeastLoad;
  BreakerLimits breaker{};
  uint64_t seed = 1;
};

class WorkerRegistry {
 public:
  static constexpr size_t kMaxWorkers = 4096;
  // Transfers between a prefill and a decode worker: two failures in a row keep the pair apart for a while.
  static constexpr BreakerLimits kPairLimits{.failures_to_open = 2, .open_us = 5'000'000, .trial_us = 1'000'000};

  explicit WorkerRegistry(RegistryOptions options);

  // A removed worker with this role and address serves again, under its old id. Faults: it is there already, or there
  // are kMaxWorkers.
  Result<WorkerId> add(Role role, std::string url, int64_t weight = 1, int32_t rank = -1);
  // Takes no new request; settle() removes it once it is idle.
  void drain(WorkerId id);
  void settle(WorkerId id);

  RegisteredWorker& worker(WorkerId id);
  const RegisteredWorker& worker(WorkerId id) const;
  const std::deque<RegisteredWorker>& workers() const { return workers_; }

  // The prefill worker at this "host:port"; none: there is none, or it is removed.
  std::optional<WorkerId> find_prefiller(std::string_view host_port) const;
  // Others than those that must be named.
  bool has_role(Role role) const;
  bool has_healthy(Role role) const;
  // Is there a healthy one that no breaker leaves out?
  bool has_open(Role role, const PickContext& context) const;
  // A healthy worker of `role` by the policy; kUnavailable if there is none. Breakers count only while they leave
  // somebody: they steer requests to better workers, and do not close the shop.
  Result<WorkerId> pick(Role role, const PickContext& context);
  LoadToken acquire(WorkerId id, int64_t tokens);

  void record_pair(WorkerId prefill, WorkerId decode, bool success, int64_t now_us);
  size_t num_bad_pairs() const { return pairs_.size(); }

 private:
  static bool is_usable(const RegisteredWorker& worker, Role role, const PickContext& context);
  bool is_open(const RegisteredWorker& worker, Role role, const PickContext& context) const;

  RegistryOptions options_;
  std::deque<RegisteredWorker> workers_;  // index = id
  Policy prefill_policy_;
  Policy decode_policy_;
  std::map<std::pair<WorkerId, WorkerId>, CircuitBreaker> pairs_;  // (prefill, decode) that failed last time
};

}  // namespace tandem::router
