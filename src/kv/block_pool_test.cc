#include "src/kv/block_pool.h"

#include <gtest/gtest.h>

#include <random>

#include "src/kv/prefix_hash.h"

namespace tandem::kv {
namespace {

Hash256 name(int value) { return Sha256().add_value(value).finish(); }

TEST(BlockPool, ReleasedBlocksComeBack) {
  BlockPool pool(4);
  const std::vector<BlockId> blocks = pool.allocate(3);
  EXPECT_EQ(pool.num_available(), 1);
  pool.release_all(blocks);
  EXPECT_EQ(pool.num_available(), 4);
  EXPECT_EQ(pool.num_cached(), 0);
  pool.check_integrity();
}

TEST(BlockPool, CachedPrefixIsFoundAndEvictedLast) {
  BlockPool pool(3);
  const std::vector<BlockId> blocks = pool.allocate(2);
  pool.register_prefix(blocks[0], name(0));
  pool.register_prefix(blocks[1], name(1));
  pool.release_all(blocks);
  EXPECT_EQ(pool.find_prefix(name(0)), blocks[0]);
  const std::vector<BlockId> first = pool.allocate(1);  // the free one goes first
  EXPECT_EQ(pool.num_cached(), 2);
  const std::vector<BlockId> second = pool.allocate(1);  // then the deeper of the two prefixes
  EXPECT_EQ(second[0], blocks[1]);
  EXPECT_EQ(pool.find_prefix(name(1)), std::nullopt);
  EXPECT_EQ(pool.find_prefix(name(0)), blocks[0]);
  pool.check_integrity();
}

TEST(BlockPool, ForgottenPrefixesAreNotFoundEvenOfHeldBlocks) {
  BlockPool pool(3);
  const std::vector<BlockId> blocks = pool.allocate(2);
  pool.register_prefix(blocks[0], name(0));
  pool.register_prefix(blocks[1], name(1));
  pool.release(blocks[1]);
  pool.forget_prefixes();
  EXPECT_EQ(pool.find_prefix(name(0)), std::nullopt);
  EXPECT_EQ(pool.find_prefix(name(1)), std::nullopt);
  EXPECT_EQ(pool.num_cached(), 0);
  pool.release(blocks[0]);
  EXPECT_TRUE(pool.is_free(blocks[0]));
  pool.check_integrity();
}

TEST(BlockPool, PinnedBlockIsNotReusedAfterItsSequenceIsGone) {
  BlockPool pool(2);
  const std::vector<BlockId> blocks = pool.allocate(2);
  pool.pin_all(blocks);
  pool.release_all(blocks);
  EXPECT_EQ(pool.num_available(), 0);
  EXPECT_EQ(pool.num_pinned(), 2);
  pool.unpin_all(blocks);
  EXPECT_EQ(pool.num_available(), 2);
}

TEST(BlockPool, MisuseIsABug) {
  BlockPool pool(2);
  const std::vector<BlockId> blocks = pool.allocate(1);
  pool.release(blocks[0]);
  EXPECT_DEATH(pool.release(blocks[0]), "holders");
  EXPECT_DEATH((void)pool.allocate(3), "3 vs 2");
  EXPECT_DEATH(pool.hold(blocks[0]), "holders");
}

TEST(BlockPool, RandomUseKeepsIntegrity) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  BlockPool pool(17);
  std::vector<std::vector<BlockId>> held;
  int next_name = 0;
  for (int step = 0; step < 5000; ++step) {
    const unsigned action = random() % 4;
    if (action == 0 && pool.num_available() > 0) {
      held.push_back(pool.allocate(1 + static_cast<int64_t>(random() % static_cast<unsigned>(pool.num_available()))));
      if (random() % 2 == 0) pool.register_prefix(held.back()[0], name(next_name++));
    } else if (action == 1 && !held.empty()) {
      const size_t which = random() % held.size();
      pool.release_all(held[which]);
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(which));
    } else if (action == 2 && !held.empty()) {
      const std::vector<BlockId> pinned = held[random() % held.size()];
      pool.pin_all(pinned);
      pool.check_integrity();
      pool.unpin_all(pinned);
    } else if (next_name > 0) {
      const int wanted = static_cast<int>(random() % static_cast<unsigned>(next_name));
      if (const std::optional<BlockId> found = pool.find_prefix(name(wanted))) {
        pool.hold(*found);
        held.push_back({*found});
      }
    }
    pool.check_integrity();
    if (held.size() > 12) {
      for (const std::vector<BlockId>& blocks : held) pool.release_all(blocks);
      held.clear();
      pool.drop_cached();
      EXPECT_EQ(pool.num_available(), pool.num_blocks());
      next_name = 0;
    }
  }
}

TEST(PrefixHashes, DependOnEveryTokenAndTheSalt) {
  const std::vector<TokenId> tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  PrefixHashes hashes(4, "");
  ASSERT_EQ(hashes.extend(tokens, 9).size(), 2U);
  const Hash256 second = hashes.extend(tokens, 9)[1];
  std::vector<TokenId> other = tokens;
  other[0] = 100;
  EXPECT_NE(PrefixHashes(4, "").extend(other, 9)[1], second);
  EXPECT_NE(PrefixHashes(4, "tenant").extend(tokens, 9)[1], second);
  EXPECT_EQ(PrefixHashes(4, "").extend(tokens, 8)[1], second);
  PrefixHashes grown(4, "");
  EXPECT_EQ(grown.extend(tokens, 3).size(), 0U);
  EXPECT_EQ(grown.extend(tokens, 8)[1], second);
}

}  // namespace
}  // namespace tandem::kv
