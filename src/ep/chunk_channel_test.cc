#include "src/ep/chunk_channel.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "src/group/step_agreement.h"
#include "src/group/test_support.h"

namespace tandem::ep {
namespace {

std::byte byte_at(size_t index, int64_t offset) {
  return static_cast<std::byte>((index * 131 + static_cast<size_t>(offset) * 7 + static_cast<size_t>(offset >> 8)) & 0xff);
}

struct Case {
  int32_t ranks;
  int64_t chunk_bytes;
  uint32_t seed;
};

class ChunkChannelTest : public testing::TestWithParam<Case> {};

// Every byte of every transfer arrives once, and all ranks see the end in the same round.
TEST_P(ChunkChannelTest, EverythingArrives) {
  const Case& c = GetParam();
  const int64_t offset = group::StepAgreement::window_bytes(c.ranks);
  group::ThreadGroup ranks(c.ranks, offset + ChunkChannel::window_bytes(c.ranks, c.chunk_bytes));
  std::mt19937 random(c.seed);
  SCOPED_TRACE(testing::Message() << "seed " << c.seed);
  std::vector<std::vector<BulkTransfer>> batches(3);
  for (std::vector<BulkTransfer>& batch : batches) {
    const size_t count = 1 + random() % 12;
    for (size_t i = 0; i < count; ++i) {
      batch.push_back({static_cast<int32_t>(random() % static_cast<uint32_t>(c.ranks)),
                       static_cast<int32_t>(random() % static_cast<uint32_t>(c.ranks)),
                       static_cast<int64_t>(1 + random() % 3000)});
    }
  }
  std::vector<std::vector<uint64_t>> ends(static_cast<size_t>(c.ranks));
  ranks.run([&](group::Fabric& fabric) {
    group::StepAgreement agreement(fabric);
    ChunkChannel channel(offset, c.chunk_bytes);
    if (fabric.rank().value == 0) {  // one rank has a past, as in a new epoch after a loss
      channel.start(c.ranks, {{0, 0, 1}});
      ASSERT_TRUE(channel.send(fabric, [](size_t, int64_t, std::span<std::byte>) {}).ok());
      ASSERT_TRUE(channel.receive(fabric, [](size_t, int64_t, std::span<const std::byte>) {}));
    }
    channel.stop();
    for (const std::vector<BulkTransfer>& batch : batches) {
      std::vector<std::vector<std::byte>> got(batch.size());
      std::vector<int64_t> next(batch.size());
      channel.start(c.ranks, batch);
      bool done = false;
      while (!done) {
        ASSERT_TRUE(channel.send(fabric, [](size_t index, int64_t at, std::span<std::byte> out) {
                             for (size_t i = 0; i < out.size(); ++i) out[i] = byte_at(index, at + static_cast<int64_t>(i));
                           }).ok());
        ASSERT_TRUE(agreement.agree({}).ok());
        done = channel.receive(fabric, [&](size_t index, int64_t at, std::span<const std::byte> in) {
          EXPECT_EQ(batch[index].target, fabric.rank().value);
          EXPECT_EQ(at, next[index]);
          next[index] += std::ssize(in);
          got[index].insert(got[index].end(), in.begin(), in.end());
        });
      }
      ends[static_cast<size_t>(fabric.rank().value)].push_back(agreement.rounds());
      for (size_t t = 0; t < batch.size(); ++t) {
        if (batch[t].target != fabric.rank().value) continue;
        ASSERT_EQ(std::ssize(got[t]), batch[t].bytes);
        for (size_t i = 0; i < got[t].size(); ++i) ASSERT_EQ(got[t][i], byte_at(t, static_cast<int64_t>(i)));
      }
    }
  });
  for (const std::vector<uint64_t>& rounds : ends) EXPECT_EQ(rounds, ends[0]);
}

INSTANTIATE_TEST_SUITE_P(Sizes, ChunkChannelTest,
                         testing::Values(Case{1, 256, 1}, Case{2, 64, 2}, Case{2, 4096, 3}, Case{3, 128, 4},
                                         Case{4, 512, 5}, Case{8, 256, 6}));

}  // namespace
}  // namespace tandem::ep
