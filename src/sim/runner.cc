#include "src/sim/runner.h"

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#include "src/base/clock.h"
#include "src/sim/violation.h"
#include "src/sim/world.h"

namespace tandem::sim {
namespace {

constexpr int64_t kProgressEvery = 500;

[[noreturn]] void throw_check(const char* file, int line, std::string_view what) {
  throw Violation("check", fmt::format("{}:{}: {}", file, line, what));
}

// Failed checks of this thread are violations meanwhile.
class ChecksThrow {
 public:
  ChecksThrow() : former_(set_check_handler(throw_check)) {}
  ~ChecksThrow() { set_check_handler(former_); }
  ChecksThrow(const ChecksThrow&) = delete;
  ChecksThrow& operator=(const ChecksThrow&) = delete;

 private:
  CheckHandler former_;
};

Outcome run_with(uint64_t seed, const RunOptions& options, kernels::Ops& ops) {
  Outcome outcome;
  outcome.seed = seed;
  const ChecksThrow checks;
  World world(seed, options.faults, options.seams, ops);
  try {
    world.run();
  } catch (const Violation& violation) {
    outcome.invariant = violation.invariant();
    outcome.message = violation.what();
  }
  if (!outcome.ok() || options.trace_always) outcome.trace = world.trace().text(options.trace_lines);
  outcome.hash = world.trace().hash();
  outcome.events = world.num_events();
  outcome.requests_ok = world.num_ok();
  outcome.requests_failed = world.num_failed();
  outcome.requests_late = world.num_late();
  outcome.retries = world.num_retries();
  outcome.migrations = world.num_migrations();
  return outcome;
}

}  // namespace

Outcome run_seed(uint64_t seed, const RunOptions& options) {
  const std::unique_ptr<kernels::Ops> ops = kernels::make_ops("ref", 1).value();
  return run_with(seed, options, *ops);
}

Summary run_many(uint64_t first_seed, int64_t runs, int threads, const RunOptions& options,
                 const std::function<void(int64_t)>& on_progress) {
  const SteadyClock clock;
  const int64_t start_us = clock.now_us();
  Summary summary;
  std::mutex mutex;
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  const auto work = [&] {
    const std::unique_ptr<kernels::Ops> ops = kernels::make_ops("ref", 1).value();
    while (!stop.load()) {
      const int64_t index = next.fetch_add(1);
      if (index >= runs) return;
      Outcome outcome = run_with(first_seed + static_cast<uint64_t>(index), options, *ops);
      const std::lock_guard<std::mutex> lock(mutex);
      ++summary.runs;
      summary.events += outcome.events;
      summary.requests_ok += outcome.requests_ok;
      summary.requests_failed += outcome.requests_failed;
      summary.requests_late += outcome.requests_late;
      summary.retries += outcome.retries;
      summary.migrations += outcome.migrations;
      if (on_progress && summary.runs % kProgressEvery == 0) on_progress(summary.runs);
      if (outcome.ok()) continue;
      stop.store(true);
      if (!summary.violation || outcome.seed < summary.violation->seed) summary.violation = std::move(outcome);
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
  summary.seconds = static_cast<double>(clock.now_us() - start_us) * 1e-6;
  return summary;
}

}  // namespace tandem::sim
