// The budget against machines that are formulas. A "step" asks for rows at a position, is charged, and teaches.
#include "src/engine/step_budget.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>

namespace tandem::engine {
namespace {

constexpr int64_t kLimitUs = 250'000;

// What a step costs: (prompt rows, position of the first) → us. Streams are part of it.
using Machine = std::function<double(int64_t rows, int64_t position)>;

struct Reading {
  int64_t longest_us = 0;
  int64_t steps = 0;
  std::vector<int64_t> chunks;
};

// Reads `length` tokens from `position` on beside streams.
Reading read_prompt(StepBudget& budget, const Machine& machine, int64_t position, int64_t length) {
  Reading reading;
  for (const int64_t end = position + length; position < end; ++reading.steps) {
    const int64_t fitting = budget.rows_within(budget.prompt_us().value(), position);
    const int64_t rows = std::min(std::max(fitting, StepBudget::kRowMultiple), end - position);
    const int64_t step_us = std::llround(machine(rows, position));
    const ChunkRows chunk{position, rows};
    budget.learn(std::span(&chunk, 1), step_us);
    reading.longest_us = std::max(reading.longest_us, step_us);
    reading.chunks.push_back(rows);
    position += rows;
  }
  return reading;
}

// 1 ms per row at first, twice that at position 4,000.
double growing(int64_t rows, int64_t position) {
  return 80'000 + static_cast<double>(rows) * 1000 * (1 + static_cast<double>(position) / 4000);
}

// A mixture of experts: 16 rows read most of the weights, further rows cost arithmetic.
double mixture(int64_t rows, int64_t) {
  const double read_us = 80'000 + 140'000 * (1 - std::exp(-static_cast<double>(rows) / 10));
  return std::max(read_us, 80'000 + 3500.0 * static_cast<double>(rows));
}

TEST(StepBudget, NoLimit) { EXPECT_FALSE(StepBudget(0).prompt_us().has_value()); }

TEST(StepBudget, StartsSmallAndFillsTheStep) {
  for (const Machine& machine : {Machine(growing), Machine(mixture)}) {
    StepBudget budget(kLimitUs);
    for (int i = 0; i < 10; ++i) budget.learn({}, 80'000);
    const Reading reading = read_prompt(budget, machine, 0, 6000);
    EXPECT_EQ(reading.chunks.front(), StepBudget::kRowMultiple);
    EXPECT_LE(reading.longest_us, kLimitUs);
    // Of the time that rows may take, at least half is used: rows are rounded down to 16.
    EXPECT_GE(machine(reading.chunks[reading.chunks.size() / 2], 3000), 0.6 * kLimitUs);
    for (int64_t rows : reading.chunks) EXPECT_TRUE(rows % 16 == 0 || rows == reading.chunks.back());
  }
}

TEST(StepBudget, KnowsDeepPositionsFromBefore) {
  StepBudget budget(kLimitUs);
  for (int i = 0; i < 10; ++i) budget.learn({}, 80'000);
  read_prompt(budget, growing, 0, 20'000);
  EXPECT_LE(read_prompt(budget, growing, 0, 3000).longest_us, kLimitUs);
  EXPECT_LE(read_prompt(budget, growing, 16'000, 3000).longest_us, 1.1 * kLimitUs);  // a prefix from the cache
}

TEST(StepBudget, AJumpToUnknownPositionsIsBounded) {
  StepBudget budget(kLimitUs);
  for (int i = 0; i < 10; ++i) budget.learn({}, 80'000);
  read_prompt(budget, growing, 0, 900);
  EXPECT_LE(read_prompt(budget, growing, 30'000, 1000).longest_us, 1.2 * kLimitUs);
}

TEST(StepBudget, AlwaysMakesProgress) {
  StepBudget budget(1000);
  for (int i = 0; i < 10; ++i) budget.learn({}, 80'000);
  for (int64_t rows : read_prompt(budget, growing, 0, 320).chunks) EXPECT_EQ(rows, StepBudget::kRowMultiple);
}

TEST(StepBudget, OneLateStepIsForgotten) {
  StepBudget budget(kLimitUs);
  for (int i = 0; i < 10; ++i) budget.learn({}, 80'000);
  read_prompt(budget, growing, 0, 600);
  const int64_t before = budget.rows_within(*budget.prompt_us(), 600);
  const ChunkRows chunk{600, before};
  budget.learn(std::span(&chunk, 1), 20 * kLimitUs);
  const int64_t after = budget.rows_within(*budget.prompt_us(), 600);
  EXPECT_LT(after, before);
  EXPECT_GE(after, before / 2);
  const Reading reading = read_prompt(budget, growing, 600, 300);
  EXPECT_GE(*std::max_element(reading.chunks.begin(), reading.chunks.end() - 1), before - 16);
}

TEST(StepBudget, FollowsAMachineThatBecomesSlower) {
  StepBudget budget(kLimitUs);
  for (int i = 0; i < 10; ++i) budget.learn({}, 80'000);
  read_prompt(budget, growing, 0, 900);
  const Machine slower = [](int64_t rows, int64_t position) { return 2 * growing(rows, position); };
  for (int i = 0; i < 10; ++i) budget.learn({}, 160'000);
  read_prompt(budget, slower, 0, 200);
  EXPECT_LE(read_prompt(budget, slower, 0, 900).longest_us, 1.1 * kLimitUs);
}

// Times that scatter by 10 %: nearly every step stays under the limit.
TEST(StepBudget, ScatteredTimes) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> scatter(0.9, 1.1);
  StepBudget budget(kLimitUs);
  for (int i = 0; i < 10; ++i) budget.learn({}, 80'000);
  const Machine machine = [&](int64_t rows, int64_t position) { return growing(rows, position) * scatter(random); };
  for (int i = 0; i < 20; ++i) EXPECT_LE(read_prompt(budget, machine, 0, 3000).longest_us, 1.15 * kLimitUs);
}

}  // namespace
}  // namespace tandem::engine
