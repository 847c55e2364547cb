// Schedules with and without faults: every invariant holds, and a seed always gives the same run.
#include <gtest/gtest.h>

#include "src/base/log.h"
#include "src/sim/runner.h"

namespace tandem::sim {
namespace {

constexpr uint64_t kFirstSeed = 1;
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kRuns = 300;
constexpr int64_t kRunsPerFault = 50;
#else
constexpr int64_t kRuns = 2000;
constexpr int64_t kRunsPerFault = 200;
#endif

Summary run(int64_t runs, const FaultSpec& faults) {
  init_log(LogLevel::kError, "");
  RunOptions options;
  options.faults = faults;
  const Summary summary = run_many(kFirstSeed, runs, 2, options);
  std::printf("seeds %lu + %ld, faults %s: %ld requests ended well, %ld with an error, %ld retries, %ld migrations, %ld events, "
      "%.0f schedules/s\n",
              static_cast<unsigned long>(kFirstSeed), static_cast<long>(summary.runs), faults.describe().c_str(),
              static_cast<long>(summary.requests_ok), static_cast<long>(summary.requests_failed),
              static_cast<long>(summary.retries), static_cast<long>(summary.migrations),
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

TEST(Sim, HoldsWithEachFault) {
  for (const char* faults : {"delay=0.3", "duplicate=0.05", "lose=0.002", "drop=0.005", "damage=0.01", "kill=0.05",
                             "freeze=0.05", "partition=0.05", "cancel=0.4"}) {
    run(kRunsPerFault, parse_fault_spec(faults).value());
  }
}

TEST(Sim, HoldsWithAllFaults) {
  const Summary summary = run(kRuns, all_faults());
  EXPECT_GT(summary.requests_ok, summary.requests_failed);
  EXPECT_GT(summary.requests_failed, 0);
  EXPECT_GT(summary.retries, 0);
  EXPECT_GT(summary.migrations, 0);
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

TEST(FaultSpec, ReadsAndWrites) {
  EXPECT_EQ(parse_fault_spec("none").value(), FaultSpec());
  EXPECT_EQ(parse_fault_spec("all").value(), all_faults());
  EXPECT_EQ(parse_fault_spec("delay=0.3,kill=1").value().describe(), "delay=0.3,kill=1");
  EXPECT_EQ(parse_fault_spec("all,kill=0").value().kill, 0);
  EXPECT_EQ(parse_fault_spec(all_faults().describe()).value(), all_faults());
  for (const char* wrong :
       {"", "some", "kill", "kill=", "kill=2", "kill=-1", "kill=0.1x", "kill=0.1,", "tea=1", "kill=nan"}) {
    EXPECT_FALSE(parse_fault_spec(wrong).ok()) << wrong;
  }
  EXPECT_EQ(parse_fault_spec("tea=1").error().param, "faults");
}

// A failing run is told with its seed, its invariant and what happened before; it fails again in the same way.
TEST(Sim, ViolationCanBeReplayed) {
  RunOptions options;
  options.seams.repeat_incarnation = true;
  options.faults.kill = 0.2;
  const Summary summary = run_many(kFirstSeed, 100, 1, options);
  ASSERT_TRUE(summary.violation.has_value());
  options.trace_lines = 0;
  const Outcome again = run_seed(summary.violation->seed, options);
  EXPECT_EQ(again.message, summary.violation->message);
  EXPECT_EQ(again.hash, summary.violation->hash);
  EXPECT_TRUE(again.trace.ends_with(summary.violation->trace));
  EXPECT_NE(again.trace.find("FAULT incarnation"), std::string::npos);
}

}  // namespace
}  // namespace tandem::sim
