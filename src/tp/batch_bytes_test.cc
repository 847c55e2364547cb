#include "src/tp/batch_bytes.h"

#include <gtest/gtest.h>

#include <random>

namespace tandem::tp {
namespace {

StepOrder make_order() {
  StepOrder order;
  order.batch.tokens = {5, 6, 7, 0};
  order.batch.logit_rows = {2, 3};
  order.batch.split_row = 2;
  order.batch.chunks.push_back({0, 3, 16, true, {BlockId(4), BlockId(9)}});
  order.batch.chunks.push_back({3, 1, 0, false, {BlockId(1)}});
  order.news.received = {BlockId(9)};
  order.news.filled = {BlockId(2), BlockId(3)};
  order.news.fill_value = 0.015F;
  order.has_part = true;
  return order;
}

TEST(BatchBytes, AnOrderComesBackAsItWas) {
  const std::vector<int32_t> numbers = write_order(make_order().batch, make_order().news, make_order().has_part);
  ASSERT_EQ(numbers.front(), std::ssize(numbers) - 1);
  const StepOrder order = read_order(std::span(numbers).subspan(1)).value();
  EXPECT_EQ(write_order(order.batch, order.news, order.has_part), numbers);
  EXPECT_EQ(order.batch.tokens, make_order().batch.tokens);
  EXPECT_EQ(order.batch.split_row, 2);
  EXPECT_EQ(order.batch.chunks[0].blocks, make_order().batch.chunks[0].blocks);
  EXPECT_FALSE(order.batch.chunks[1].is_prompt);
  EXPECT_EQ(order.news.fill_value, 0.015F);
  EXPECT_TRUE(order.has_part);
}

TEST(BatchBytes, AnEmptyOrder) {
  const std::vector<int32_t> numbers = write_order({}, {}, false);
  EXPECT_TRUE(read_order(std::span(numbers).subspan(1)).value().batch.tokens.empty());
}

TEST(BatchBytes, WhatIsNoOrderIsRefused) {
  const std::vector<int32_t> numbers = write_order(make_order().batch, make_order().news, make_order().has_part);
  const std::span<const int32_t> all = std::span(numbers).subspan(1);
  for (size_t length = 0; length < all.size(); ++length) {
    EXPECT_FALSE(read_order(all.first(length)).ok()) << length;
  }
  constexpr uint32_t kSeed = 3;
  std::mt19937 random(kSeed);
  for (int round = 0; round < 2000; ++round) {
    std::vector<int32_t> damaged(all.begin(), all.end());
    damaged[random() % damaged.size()] = static_cast<int32_t>(random());
    (void)read_order(damaged).ok();  // neither crashes nor takes gigabytes
  }
}

}  // namespace
}  // namespace tandem::tp
