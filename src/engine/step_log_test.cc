#include "src/engine/step_log.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace tandem::engine {
namespace {

TEST(StepLog, KeepsTheLastStepsInOrder) {
  StepLog log;
  EXPECT_TRUE(log.steps().empty());
  const uint64_t count = StepLog::kSteps + 5;
  for (uint64_t round = 1; round <= count; ++round) {
    StepTimes step;
    step.round = round;
    log.add(step);
    ASSERT_EQ(log.steps().size(), std::min<size_t>(round, StepLog::kSteps));
  }
  const std::vector<StepTimes> steps = log.steps();
  ASSERT_EQ(steps.size(), StepLog::kSteps);
  for (size_t i = 0; i < steps.size(); ++i) ASSERT_EQ(steps[i].round, i + 6);
}

}  // namespace
}  // namespace tandem::engine
