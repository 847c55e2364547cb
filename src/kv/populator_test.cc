#include "src/kv/populator.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <thread>
#include <vector>

#include "src/kernels/ops.h"

namespace tandem::kv {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

// 4 layers, 64 KiB per block and layer.
model::KvLayout big_blocks() {
  model::KvLayout layout;
  layout.num_layers = 4;
  layout.block_size = 16;
  layout.bytes_per_token = 4096;
  layout.dtype = kernels::DType::kF32;
  layout.kv_heads = 4;
  layout.head_dim = 128;
  return layout;
}

// How much of some memory is present, as the kernel says.
int64_t present_bytes(const std::byte* address, int64_t bytes) {
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  std::vector<unsigned char> pages(static_cast<size_t>(bytes / page));
  EXPECT_EQ(::mincore(const_cast<std::byte*>(address), static_cast<size_t>(bytes), pages.data()), 0);
  int64_t present = 0;
  for (const unsigned char flags : pages) present += (flags & 1) * page;
  return present;
}

class PopulatorTest : public testing::TestWithParam<bool> {
 protected:
  void make(int64_t num_blocks) {
    ops_ = kernels::make_ops("ref", 1).value();
    cache_ = std::make_unique<model::KvCache>(*ops_, big_blocks(), num_blocks, GetParam());
  }
  void wait_for(const Populator& populator, int64_t num_blocks) {
    for (int i = 0; i < 10'000 && populator.num_present() < num_blocks; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ASSERT_EQ(populator.num_present(), num_blocks);
  }
  // Of each layer, from block 0 on.
  std::vector<int64_t> present() const {
    std::vector<int64_t> of_layers;
    for (int64_t l = 0; l < 4; ++l) {
      of_layers.push_back(present_bytes(cache_->block_address(l, BlockId(0)), cache_->layer_stride_bytes()));
    }
    return of_layers;
  }

  std::unique_ptr<kernels::Ops> ops_;
  std::unique_ptr<model::KvCache> cache_;
};

INSTANTIATE_TEST_SUITE_P(Memory, PopulatorTest, testing::Bool(), [](const testing::TestParamInfo<bool>& test) {
  return test.param ? "shared" : "private";
});

TEST_P(PopulatorTest, StaysAheadOfUseAndTakesNoMore) {
  make(1024);  // 64 MiB a layer
  for (const int64_t bytes : present()) EXPECT_LE(bytes, 2 * kMiB);
  Populator populator(*cache_, 16 * kMiB);  // 64 blocks
  wait_for(populator, 64);
  for (const int64_t bytes : present()) {
    EXPECT_GE(bytes, 4 * kMiB);
    EXPECT_LE(bytes, 8 * kMiB);  // whole huge pages
  }
  populator.note_used(200);
  populator.note_used(100);  // never fewer
  wait_for(populator, 264);
  for (const int64_t bytes : present()) {
    EXPECT_GE(bytes, 64 * kMiB / 16 + 64 * kMiB / 16);  // those that were used in between are their user's
    EXPECT_LE(bytes, 264 * kMiB / 16 + 4 * kMiB);
  }
}

TEST_P(PopulatorTest, EndsAtTheEndOfTheCache) {
  make(100);
  Populator populator(*cache_, 64 * kMiB);
  wait_for(populator, 100);
  populator.note_used(100);
  EXPECT_EQ(populator.num_present(), 100);
  for (const int64_t bytes : present()) EXPECT_EQ(bytes, cache_->layer_stride_bytes());
}

TEST_P(PopulatorTest, LeavesWhatStepsWriteMeanwhile) {
  make(512);
  Populator populator(*cache_, kMiB);
  const int64_t count = cache_->layer_stride_bytes() / 8;
  for (int64_t l = 0; l < 4; ++l) {
    int64_t* const words = reinterpret_cast<int64_t*>(cache_->block_address(l, BlockId(0)));
    for (int64_t i = 0; i < count; ++i) {
      if (i % (count / 64) == 0) populator.note_used(512 * i / count);
      words[i] = l * count + i + 1;
    }
  }
  populator.note_used(512);
  wait_for(populator, 512);
  for (int64_t l = 0; l < 4; ++l) {
    const int64_t* const words = reinterpret_cast<const int64_t*>(cache_->block_address(l, BlockId(0)));
    for (int64_t i = 0; i < count; ++i) ASSERT_EQ(words[i], l * count + i + 1) << l;
  }
}

}  // namespace
}  // namespace tandem::kv
