#include "src/engine/memory_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tandem::engine {
namespace {

using testing::HasSubstr;

constexpr int64_t kMiB = 1 << 20;

// 1 MiB a block; a request of full length needs 64 of them.
model::MemoryNeeds needs() {
  model::MemoryNeeds result;
  result.weight_bytes = 1000 * kMiB;
  result.staging_bytes = 100 * kMiB;
  result.workspace_bytes = 50 * kMiB;
  result.max_model_len = 1024;
  result.kv.num_layers = 1;
  result.kv.block_size = 16;
  result.kv.bytes_per_token = 65536;
  return result;
}

AvailableMemory memory(int64_t mib) { return {mib * kMiB, "MemAvailable"}; }

std::string error_of(const MemoryRequest& request, int64_t mib) {
  const Result<MemoryPlan> plan = plan_memory(needs(), request, memory(mib));
  return plan.ok() ? fmt::format("{} blocks", plan->num_blocks) : plan.error().message;
}

TEST(MemoryPlan, DefaultIsOneGiBOrWhatFits) {
  EXPECT_EQ(plan_memory(needs(), {}, memory(100'000))->num_blocks, 1024);
  EXPECT_EQ(plan_memory(needs(), {}, memory(2000))->num_blocks, 1800 - 1050);
  EXPECT_EQ(plan_memory(needs(), {.utilization = 1}, memory(1050 + 64))->num_blocks, 64);
  model::MemoryNeeds deep = needs();
  deep.max_model_len = 16 * 3000;
  EXPECT_EQ(plan_memory(deep, {}, memory(100'000))->num_blocks, 3000);
}

TEST(MemoryPlan, GivenUtilizationIsFilled) {
  EXPECT_EQ(plan_memory(needs(), {.utilization = 0.5, .fill = true}, memory(10'000))->num_blocks, 5000 - 1050);
}

TEST(MemoryPlan, RefusesWithValueLimitAndRemedy) {
  const std::string small = error_of({.utilization = 1}, 1050 + 63);
  EXPECT_THAT(small, HasSubstr("1000.0 MiB of weights, 50.0 MiB of workspace"));
  EXPECT_THAT(small, HasSubstr("1.0 MiB too little; lower --max-model-len to 1008"));
  EXPECT_THAT(error_of({.utilization = 1}, 900), HasSubstr("use a --quantization of fewer bits"));
  EXPECT_THAT(error_of({.kv_bytes = 500 * kMiB, .utilization = 1}, 1150),
              HasSubstr("lower --kv-cache-memory-bytes to 104857600"));
  EXPECT_THAT(error_of({.num_blocks = 500, .utilization = 1}, 1150),
              HasSubstr("lower --num-gpu-blocks-override to 100"));
  EXPECT_THAT(error_of({.num_blocks = 63}, 9000), HasSubstr("63 KV blocks (63.0 MiB) cannot hold one request"));
  EXPECT_THAT(error_of({.kv_bytes = 63 * kMiB}, 9000), HasSubstr("raise --kv-cache-memory-bytes"));
}

// Packing a large weight may take more than serving does.
TEST(MemoryPlan, LoadingCounts) {
  model::MemoryNeeds heavy = needs();
  heavy.staging_bytes = 2000 * kMiB;
  EXPECT_FALSE(plan_memory(heavy, {.utilization = 1}, memory(2999)).ok());
  EXPECT_TRUE(plan_memory(heavy, {.utilization = 1}, memory(3000)).ok());
}

}  // namespace
}  // namespace tandem::engine
