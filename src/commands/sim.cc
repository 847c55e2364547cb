// tandem sim: many simulated clusters, each with its own seed and faults.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <thread>

#include "src/base/log.h"
#include "src/commands/client_common.h"
#include "src/commands/commands.h"
#include "src/sim/runner.h"

namespace tandem::commands {
namespace {

int report_violation(const sim::Outcome& outcome, const sim::FaultSpec& faults) {
  std::printf("%s", outcome.trace.c_str());
  std::printf("\nseed %lu breaks the invariant %s\n", static_cast<unsigned long>(outcome.seed),
              outcome.message.c_str());
  std::printf("again: tandem sim --seed %lu --runs 1 --faults %s --trace\n", static_cast<unsigned long>(outcome.seed),
              faults.describe().c_str());
  return 1;
}

}  // namespace

int run_sim(const Options& options) {
  init_log(LogLevel::kError, "");
  const Result<sim::FaultSpec> faults = sim::parse_fault_spec(options.text("faults"));
  if (!faults.ok()) return fail_with(faults.error());
  const int64_t runs = options.integer("runs");
  int threads = static_cast<int>(options.integer("threads"));
  if (threads == 0) threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));

  sim::RunOptions run;
  run.faults = *faults;
  if (options.flag("trace")) run.trace_lines = 0;
  const uint64_t seed = static_cast<uint64_t>(options.integer("seed"));
  if (runs == 1) {
    run.trace_always = options.flag("trace");
    const sim::Outcome outcome = sim::run_seed(seed, run);
    if (!outcome.ok()) return report_violation(outcome, *faults);
    std::printf("%s%ld events, trace %016lx: every invariant held\n", outcome.trace.c_str(),
                static_cast<long>(outcome.events), static_cast<unsigned long>(outcome.hash));
    return 0;
  }
  const bool shows_progress = isatty(STDERR_FILENO) == 1;
  const sim::Summary summary =
      sim::run_many(seed, runs, static_cast<int>(std::min<int64_t>(threads, runs)), run, [&](int64_t done) {
        if (shows_progress) std::fprintf(stderr, "\r%ld of %ld", static_cast<long>(done), static_cast<long>(runs));
      });
  if (shows_progress) std::fprintf(stderr, "\r");
  if (summary.violation) return report_violation(*summary.violation, *faults);
  std::printf("%ld schedules in %.1f s (%.0f/s), faults %s: every invariant held\n", static_cast<long>(summary.runs),
              summary.seconds, static_cast<double>(summary.runs) / summary.seconds, faults->describe().c_str());
  std::printf("%ld requests ended well, %ld with a named error, of which %ld at their deadline; %ld retries, %ld migrations, "
      "%ld events\n",
              static_cast<long>(summary.requests_ok), static_cast<long>(summary.requests_failed),
              static_cast<long>(summary.requests_late), static_cast<long>(summary.retries),
              static_cast<long>(summary.migrations), static_cast<long>(summary.events));
  return 0;
}

}  // namespace tandem::commands
