#include "src/tp/order_stream.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "src/group/test_support.h"
#include "src/kernels/ops.h"

namespace tandem::tp {
namespace {

using group::RankId;
using testing::HasSubstr;

constexpr int64_t kRing = 512;
constexpr int64_t kBlocks = 8;

model::KvLayout small_layout() {
  model::KvLayout layout;
  layout.kind = model::KvKind::kMla;
  layout.num_layers = 3;
  layout.block_size = 4;
  layout.latent_dim = 12;
  layout.rope_dim = 4;
  layout.bytes_per_token = 32;
  return layout;
}

OrderOptions options_of(int32_t first, int32_t ranks) { return {RankId(first), ranks, 128, kRing}; }

StepOrder make_order(std::mt19937& random) {
  StepOrder order;
  const int32_t rows = static_cast<int32_t>(random() % 300);  // more numbers than the ring has bytes, at times
  for (int32_t i = 0; i < rows; ++i) order.batch.tokens.push_back(static_cast<TokenId>(random() % 1000));
  if (rows > 0) order.batch.chunks.push_back({0, rows, 0, true, {BlockId(1), BlockId(0)}});
  for (int32_t block = 0; block < kBlocks; ++block) {
    if (random() % 3 == 0) order.news.received.push_back(BlockId(block));
  }
  return order;
}

TEST(OrderStream, OrdersAndKvArriveAtAllRanks) {
  constexpr uint32_t kSeed = 5;
  SCOPED_TRACE(kSeed);
  const std::unique_ptr<kernels::Ops> ops = kernels::make_ops("ref", 1).value();
  constexpr int32_t kRanks = 3;
  group::ThreadGroup group(kRanks + 1, 128 + kRing);
  std::vector<std::unique_ptr<model::KvCache>> caches;
  for (int32_t r = 0; r < kRanks; ++r) caches.push_back(std::make_unique<model::KvCache>(*ops, small_layout(), kBlocks));
  constexpr int kOrders = 200;
  group.run([&](group::Fabric& fabric) {
    if (fabric.rank() == RankId(0)) return;  // of another data rank
    const int32_t rank = fabric.rank().value - 1;
    model::KvCache& cache = *caches[static_cast<size_t>(rank)];
    std::mt19937 random(kSeed);  // all draw the same orders
    OrderSender sender(options_of(1, kRanks));
    OrderReceiver receiver(options_of(1, kRanks));
    rank == 0 ? sender.attach(fabric) : receiver.attach(fabric);
    std::vector<std::byte> expected(static_cast<size_t>(cache.bytes()));
    for (int i = 0; i < kOrders; ++i) {
      StepOrder order = make_order(random);
      for (const BlockId block : order.news.received) {
        for (int64_t layer = 0; layer < 3; ++layer) {
          const int64_t offset = cache.block_address(layer, block) - cache.base();
          std::memset(expected.data() + offset, static_cast<int>(random() % 256), 128);
        }
      }
      if (rank == 0) {
        std::memcpy(cache.base(), expected.data(), expected.size());
        ASSERT_TRUE(sender.send(order.batch, order.news, cache).ok());
        continue;
      }
      const Result<model::Batch> batch = receiver.receive(cache);
      ASSERT_TRUE(batch.ok()) << batch.error().message;
      ASSERT_EQ(batch->tokens, order.batch.tokens) << "order " << i;
      ASSERT_EQ(std::memcmp(cache.base(), expected.data(), expected.size()), 0) << "order " << i;
    }
  });
}

TEST(OrderStream, KvThatIsMadeUpIsMadeUpEverywhere) {
  const std::unique_ptr<kernels::Ops> ops = kernels::make_ops("ref", 1).value();
  group::ThreadGroup group(2, 128 + kRing);
  model::KvCache first(*ops, small_layout(), kBlocks);
  model::KvCache second(*ops, small_layout(), kBlocks);
  first.fill(BlockId(3), 0.5F);
  group.run([&](group::Fabric& fabric) {
    StepOrder order;
    order.news.filled = {BlockId(3)};
    order.news.fill_value = 0.5F;
    if (fabric.rank() == RankId(0)) {
      OrderSender sender(options_of(0, 2));
      sender.attach(fabric);
      ASSERT_TRUE(sender.send(order.batch, order.news, first).ok());
    } else {
      OrderReceiver receiver(options_of(0, 2));
      receiver.attach(fabric);
      ASSERT_TRUE(receiver.receive(second).ok());
    }
  });
  EXPECT_EQ(std::memcmp(first.base(), second.base(), static_cast<size_t>(first.bytes())), 0);
}

// Heads of which each rank has some: their KV is where all look for it, and both must know that.
TEST(OrderStream, OneMemoryForAllRanksIsNoSecret) {
  const std::unique_ptr<kernels::Ops> ops = kernels::make_ops("ref", 1).value();
  model::KvLayout layout = small_layout();
  layout.kind = model::KvKind::kGqa;
  layout.kv_heads = 2;
  layout.head_dim = 4;
  model::KvCache whole(*ops, layout, kBlocks);
  model::KvCache own(*ops, layout.with_heads(1), kBlocks);
  for (const bool sender_has_part : {false, true}) {
    for (const bool receiver_has_part : {false, true}) {
      group::ThreadGroup group(2, 128 + kRing);
      group.run([&](group::Fabric& fabric) {
        model::KvCache part = model::KvCache::part_of(whole, {fabric.rank().value, 2});
        StepOrder order;
        order.batch.tokens = {7};
        if (fabric.rank() == RankId(0)) {
          OrderSender sender(options_of(0, 2));
          sender.attach(fabric);
          ASSERT_TRUE(sender.send(order.batch, order.news, sender_has_part ? part : own).ok());
          return;
        }
        OrderReceiver receiver(options_of(0, 2));
        receiver.attach(fabric);
        const Result<model::Batch> batch = receiver.receive(receiver_has_part ? part : own);
        ASSERT_EQ(batch.ok(), sender_has_part == receiver_has_part);
        if (batch.ok()) return;
        EXPECT_THAT(batch.error().message, HasSubstr("let tensor rank 0 start the others itself"));
      });
    }
  }
}

TEST(OrderStream, BlocksThatThisRankLacksAreRefused) {
  const std::unique_ptr<kernels::Ops> ops = kernels::make_ops("ref", 1).value();
  group::ThreadGroup group(2, 128 + kRing);
  model::KvCache large(*ops, small_layout(), kBlocks + 1);
  model::KvCache small(*ops, small_layout(), kBlocks);
  group.run([&](group::Fabric& fabric) {
    StepOrder order;
    order.batch.tokens = {1};
    order.batch.chunks.push_back({0, 1, 0, true, {BlockId(kBlocks)}});
    if (fabric.rank() == RankId(0)) {
      OrderSender sender(options_of(0, 2));
      sender.attach(fabric);
      ASSERT_TRUE(sender.send(order.batch, order.news, large).ok());
    } else {
      OrderReceiver receiver(options_of(0, 2));
      receiver.attach(fabric);
      EXPECT_THAT(receiver.receive(small).error().message, HasSubstr("ordered KV block 8, this rank has 0 … 7"));
    }
  });
}

TEST(OrderStream, ALostGroupEndsTheWait) {
  const std::unique_ptr<kernels::Ops> ops = kernels::make_ops("ref", 1).value();
  group::ThreadGroup group(2, 128 + kRing);
  model::KvCache cache(*ops, small_layout(), kBlocks);
  group.run([&](group::Fabric& fabric) {
    if (fabric.rank() == RankId(0)) {
      group.fabric(1).end(make_error(ErrorKind::kUnavailable, "rank 0 is gone"));
      return;
    }
    OrderReceiver receiver(options_of(0, 2));
    receiver.attach(fabric);
    EXPECT_EQ(receiver.receive(cache).error().message, "rank 0 is gone");
  });
}

}  // namespace
}  // namespace tandem::tp
