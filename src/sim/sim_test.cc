// Schedules with and without faults: every invariant holds, and a seed always gives the same run.
#include <gtest/gtest.h>

#include "src/base/log.h"
#include "src/sim/runner.h"

namespace tandem::sim {
namespace {

constexpr uint64_t kFirstSeed = 1;

Summary run(int64_t runs, const FaultSpec& faults) {
  init_log(LogLevel::kError, "");
  RunOptions options;
  options.faults = faults;
  const Summary summary = run_many(kFirstSeed, runs, 2, options);
  std::printf("seeds %lu + %ld, faults %s: %ld requests ended well, %ld with an error, %ld events, %.0f schedules/s\n",
              static_cast<unsigned long>(kFirstSeed), static_cast<long>(summary.runs), faults.describe().c_str(),
              static_cast<long>(summary.requests_ok), static_cast<long>(summary.requests_failed),
              static_cast<long>(summary.events), static_cast<double>(summary.runs) / summary.seconds);
  if (summary.violation) {
    ADD_FAILURE() << "seed " << summary.violation->seed << ": " << summary.violation->message << "\n"
                  << summary.violation->trace;
  }
  return summary;
}

TEST(Sim, HoldsWithoutFaults) {
  const Summary summary = run(200, {});
  EXPECT_GT(summary.requests_ok, 10 * summary.requests_failed);  // a few have a deadline that is too short
}

TEST(Sim, SameSeedSameTrace) {
  RunOptions options;
  options.faults = all_faults();
  for (uint64_t seed = kFirstSeed; seed < kFirstSeed + 20; ++seed) {
    const Outcome once = run_seed(seed, options);
    const Outcome again = run_seed(seed, options);
    EXPECT_EQ(once.hash, again.hash) << "seed " << seed;
    EXPECT_EQ(once.events, again.events);
    EXPECT_NE(once.hash, run_seed(seed + 1000, options).hash);
  }
}

}  // namespace
}  // namespace tandem::sim
