// The workers a router knows: address, health and load. No sockets and no clock; one thread.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/router/policy.h"

namespace tandem::router {

enum class Role : uint8_t { kPrefill, kDecode };
const char* role_name(Role role);  // "prefill", "decode"

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

struct RegisteredWorker {
  WorkerId id;
  Role role = Role::kDecode;
  std::string url;
  HealthTracker tracker{};
  std::shared_ptr<WorkerLoad> load = std::make_shared<WorkerLoad>();
};

class WorkerRegistry {
 public:
  explicit WorkerRegistry(PolicyKind kind) : prefill_policy_(kind), decode_policy_(kind) {}

  WorkerId add(Role role, std::string url);
  RegisteredWorker& worker(WorkerId id);
  const RegisteredWorker& worker(WorkerId id) const;
  const std::deque<RegisteredWorker>& workers() const { return workers_; }

  bool has_role(Role role) const;
  bool has_healthy(Role role) const;
  // A healthy worker of `role` that is not in `excluded`, by the policy; kUnavailable if there is none.
  Result<WorkerId> pick(Role role, std::span<const WorkerId> excluded);
  LoadToken acquire(WorkerId id, int64_t tokens);

 private:
  std::deque<RegisteredWorker> workers_;  // index = id
  Policy prefill_policy_;
  Policy decode_policy_;
};

}  // namespace tandem::router
