#include "src/eplb/load_window.h"

#include <gtest/gtest.h>

#include <deque>

#include "src/eplb/test_support.h"

namespace tandem::eplb {
namespace {

ExpertLoad step_of(int64_t value) { return load_of({{value, 2 * value}, {0, 1}}); }

TEST(LoadWindow, SumsWhatItRemembers) {
  LoadWindow window(2, 2, 4);  // four buckets of one step
  EXPECT_EQ(window.num_steps(), 0);
  EXPECT_TRUE(window.samples().empty());
  for (int64_t i = 1; i <= 6; ++i) window.add_step(step_of(i));
  EXPECT_EQ(window.num_steps(), 4);
  EXPECT_EQ(window.total(), load_of({{3 + 4 + 5 + 6, 2 * 18}, {0, 4}}));
  EXPECT_EQ(window.samples(), (LoadSeries{step_of(3), step_of(4), step_of(5), step_of(6)}));
  window.clear();
  EXPECT_EQ(window.total(), ExpertLoad(2, 2));
  EXPECT_TRUE(window.samples().empty());
}

// Against a plain list of all steps, for windows that buckets divide and do not divide.
TEST(LoadWindow, AgreesWithAListOfSteps) {
  const uint64_t seed = 5;
  SCOPED_TRACE(fmt::format("seed {}", seed));
  RandomBits random(seed);
  for (const int64_t size : {1, 2, 15, 16, 17, 31, 32, 33, 100, 1000}) {
    LoadWindow window(2, 2, size);
    std::deque<ExpertLoad> steps;
    for (int64_t i = 0; i < 3 * size; ++i) {
      steps.push_back(step_of(below(random, 1000)));
      window.add_step(steps.back());
      while (std::ssize(steps) > window.num_steps()) steps.pop_front();
      ASSERT_LE(window.num_steps(), size);
      ASSERT_GE(window.num_steps(), std::min(i + 1, size - 2 * window.steps_per_bucket() + 2));
      ASSERT_EQ(window.total(), sum_of(std::vector<ExpertLoad>(steps.begin(), steps.end()))) << size << " " << i;
      ASSERT_EQ(sum_of(window.samples()), window.total());
      ASSERT_LE(std::ssize(window.samples()), LoadWindow::kBuckets);
    }
  }
}

TEST(ExpertLoad, SumsOverRanksEntryByEntry) {
  const LoadSeries first{step_of(1), step_of(2)};
  const LoadSeries second{step_of(10), step_of(20)};
  const std::vector<LoadSeries> ranks{first, second, first};
  EXPECT_EQ(sum_over_ranks(ranks), (LoadSeries{load_of({{12, 24}, {0, 3}}), load_of({{24, 48}, {0, 3}})}));
}

}  // namespace
}  // namespace tandem::eplb
