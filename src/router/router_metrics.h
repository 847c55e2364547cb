// What a router counts. Worker by worker where the number of series is bounded by that of workers.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "src/base/metrics.h"
#include "src/router/registry.h"

namespace tandem::router {

class RouterMetrics {
 public:
  // Of several in one process that share the registry, each has a name, `front_end`: a label of what only one knows.
  explicit RouterMetrics(Registry& registry, std::string front_end = {});

  // Of workers in the order of their ids.
  void add_worker(const RegisteredWorker& worker);
  void show(const RegisteredWorker& worker);
  void leg_failed(const RegisteredWorker& worker, ErrorKind kind);
  // What became of a request whose leg failed there: "retried", "migrated", "fallen_back" (decode computes the prompt
  // itself), "failed". At most workers x error kinds x 4 series.
  void after_failure(const RegisteredWorker& worker, ErrorKind cause, const char* outcome);
  void outcome(const char* how);
  void outcome(ErrorKind kind) { outcome(error_kind_name(kind)); }
  void local(const char* reason);
  void breaker_opened(const RegisteredWorker& worker);

  Counter& retries;
  Counter& migrations;
  Counter& pair_failures;
  Counter& released_publications;
  Histogram& queue_seconds;
  Histogram& reserve_seconds;
  Histogram& prefill_seconds;
  Histogram& handover_seconds;
  Histogram& first_token_seconds;

 private:
  struct WorkerGauges {
    Gauge* up;
    Gauge* left_out;
    Gauge* requests;
    Gauge* tokens;
  };
  Registry& registry_;
  const std::string front_end_;
  Counter& ok_;
  std::vector<WorkerGauges> workers_;  // by worker id
};

}  // namespace tandem::router
