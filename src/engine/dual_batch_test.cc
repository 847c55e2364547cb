#include "src/engine/dual_batch.h"

#include <gtest/gtest.h>

namespace tandem::engine {
namespace {

std::vector<model::Chunk> make_chunks(const std::vector<int32_t>& rows) {
  std::vector<model::Chunk> chunks;
  int32_t first = 0;
  for (const int32_t count : rows) {
    model::Chunk chunk;
    chunk.first_row = first;
    chunk.num_rows = count;
    first += count;
    chunks.push_back(chunk);
  }
  return chunks;
}

TEST(DualBatch, AStepNeedsEnoughRows) {
  const DualBatchLimits limits{true, 8, 64};
  EXPECT_FALSE(can_split(limits, 7, false));
  EXPECT_TRUE(can_split(limits, 8, false));
  EXPECT_FALSE(can_split(limits, 63, true));
  EXPECT_TRUE(can_split(limits, 64, true));
  EXPECT_FALSE(can_split({true, 1, 1}, 1, false));  // nothing to cut
  EXPECT_FALSE(can_split({false, 8, 64}, 1000, false));
}

TEST(DualBatch, CutsBetweenChunksNearTheMiddle) {
  EXPECT_EQ(choose_split(make_chunks({1, 1})), 1);
  EXPECT_EQ(choose_split(make_chunks({1, 1, 1})), 2);
  EXPECT_EQ(choose_split(make_chunks({100})), 50);
  EXPECT_EQ(choose_split(make_chunks({101})), 51);
  EXPECT_EQ(choose_split(make_chunks({52, 48})), 52);
  EXPECT_EQ(choose_split(make_chunks({48, 52})), 50);  // the second part would have more than half
  EXPECT_EQ(choose_split(make_chunks({90, 10})), 50);
  EXPECT_EQ(choose_split(make_chunks({1, 1, 1, 1, 96})), 50);
  EXPECT_EQ(choose_split(make_chunks({30, 30, 40})), 60);
}

}  // namespace
}  // namespace tandem::engine
