#include "src/transfer/checksum.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <random>
#include <set>
#include <vector>

#include "src/base/clock.h"
#include "src/transfer/test_support.h"

namespace tandem::transfer {
namespace {

TEST(Checksum, SeesEveryChangedBitAndTheLength) {
  std::mt19937_64 random(kFirstSeed);
  for (size_t size : {1UL, 7UL, 8UL, 63UL, 64UL, 65UL, 200UL}) {
    std::vector<std::byte> data(size);
    for (std::byte& byte : data) byte = static_cast<std::byte>(random());
    const uint64_t sum = checksum(data);
    EXPECT_EQ(checksum(data), sum);
    for (size_t bit = 0; bit < 8 * size; ++bit) {
      const std::byte flip = static_cast<std::byte>(1U << (bit % 8));
      data[bit / 8] ^= flip;
      EXPECT_NE(checksum(data), sum);
      data[bit / 8] ^= flip;
    }
  }
  std::set<uint64_t> sums;
  for (size_t size = 0; size < 300; ++size) sums.insert(checksum(std::vector<std::byte>(size)));
  EXPECT_EQ(sums.size(), 300U);
}

TEST(Checksum, SeesSwappedBlocks) {
  std::vector<std::byte> data(4096);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i / 1024);
  const uint64_t sum = checksum(data);
  std::swap_ranges(data.begin(), data.begin() + 1024, data.begin() + 1024);
  EXPECT_NE(checksum(data), sum);
}

TEST(Checksum, IsFast) {
  const std::vector<std::byte> data(63 * 1024);
  const SteadyClock clock;
  uint64_t sum = 0;
  const int64_t start_us = clock.now_us();
  for (int i = 0; i < 2000; ++i) sum ^= checksum(data);
  const double seconds = static_cast<double>(clock.now_us() - start_us) * 1e-6;
  std::printf("checksum: %.1f GB/s (%lu)\n", 2000.0 * 63 * 1024 / seconds * 1e-9, static_cast<unsigned long>(sum & 1));
}

TEST(Checksum, IsThatOfThePiecesTogether) {
  std::mt19937_64 random(7);
  std::vector<std::byte> data(5000);
  for (std::byte& byte : data) byte = static_cast<std::byte>(random());
  for (int round = 0; round < 200; ++round) {
    const std::span<const std::byte> whole = std::span(data).first(random() % data.size());
    std::vector<std::span<const std::byte>> pieces;
    for (size_t at = 0; at < whole.size();) {
      const size_t count = std::min<size_t>(random() % (round % 2 == 0 ? 100 : 1000), whole.size() - at);
      pieces.push_back(whole.subspan(at, count));
      at += count;
    }
    ASSERT_EQ(checksum(pieces), checksum(whole)) << round;
  }
}

}  // namespace
}  // namespace tandem::transfer
