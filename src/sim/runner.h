// Many schedules, each from its own seed.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "src/sim/fault_spec.h"
#include "src/sim/seams.h"

namespace tandem::sim {

struct Outcome {
  uint64_t seed = 0;
  std::string invariant;  // "" if all held
  std::string message;
  std::string trace;  // its last lines, after a violation or if asked for
  uint64_t hash = 0;  // of the whole trace
  int64_t events = 0;
  int64_t requests_ok = 0;
  int64_t requests_failed = 0;
  int64_t requests_late = 0;  // of the failed ones: at their deadline
  int64_t retries = 0;  // of the production router
  int64_t migrations = 0;

  bool ok() const { return invariant.empty(); }
};

struct RunOptions {
  FaultSpec faults;
  Seams seams;
  int64_t trace_lines = 60;   // of a failing run; 0: all
  bool trace_always = false;  // also of a run without violation
};

// Runs one schedule. A failed CHECK of the code under simulation is the violation "check".
Outcome run_seed(uint64_t seed, const RunOptions& options);

struct Summary {
  int64_t runs = 0;  // that were finished
  int64_t events = 0;
  int64_t requests_ok = 0;
  int64_t requests_failed = 0;
  int64_t requests_late = 0;  // of the failed ones: at their deadline
  int64_t retries = 0;  // of the production router
  int64_t migrations = 0;
  double seconds = 0;
  std::optional<Outcome> violation;  // of the lowest seed that was seen to fail
};

// Seeds first_seed … first_seed + runs - 1 over `threads` threads; stops at the first violation.
// `on_progress` is called with the number of runs done, now and then, from any of the threads.
Summary run_many(uint64_t first_seed, int64_t runs, int threads, const RunOptions& options,
                 const std::function<void(int64_t)>& on_progress = nullptr);

}  // namespace tandem::sim
