// Parts of a cache of all heads: what tensor ranks write to theirs, and read from it, against one rank with all heads,
// byte for byte; and the same memory in a second mapping.
#include "src/model/kv_cache.h"

#include <gmock/gmock.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>

#include "src/kernels/shapes.h"
#include "src/kernels/test_support.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::Matrix;
using testing::HasSubstr;

constexpr DType kDTypes[] = {DType::kF32, DType::kBf16, DType::kF8E4M3};

KvLayout layout_of(DType dtype, int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t num_layers) {
  KvLayout layout;
  layout.dtype = dtype;
  layout.num_layers = num_layers;
  layout.block_size = block_size;
  layout.kv_heads = kv_heads;
  layout.head_dim = head_dim;
  layout.bytes_per_token = 2 * kv_heads * kernels::cached_vector_bytes(dtype, head_dim);
  return layout;
}

Matrix<float> columns(const Matrix<float>& all, int64_t first, int64_t count) {
  Matrix<float> some(all.rows, count);
  for (int64_t row = 0; row < all.rows; ++row) std::copy_n(all.row(row) + first, count, some.row(row));
  return some;
}

std::vector<std::byte> bytes_of(const KvCache& cache) { return {cache.base(), cache.base() + cache.bytes()}; }

// Keys and values of some tokens, in slots of a cache, and queries that see all of them.
struct Tokens {
  Matrix<float> k, v, q;  // by columns of heads
  std::vector<int64_t> slots;
  std::vector<int32_t> blocks;  // the table of the one sequence
};

Tokens make_tokens(kernels::Random& random, const KvLayout& layout, int64_t num_blocks, int64_t q_heads) {
  const int64_t count = random.integer(1, num_blocks * layout.block_size);
  Tokens tokens{random.matrix(count, layout.kv_heads * layout.head_dim),
                random.matrix(count, layout.kv_heads * layout.head_dim),
                random.matrix(1, q_heads * layout.head_dim), {}, random.permutation(num_blocks)};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = tokens.blocks[static_cast<size_t>(i / layout.block_size)];
    tokens.slots.push_back(block * layout.block_size + i % layout.block_size);
  }
  return tokens;
}

void write(kernels::Device& device, const Tokens& tokens, const KvCache& cache, int64_t layer, int64_t first_head) {
  const KvLayout& layout = cache.layout();
  const int64_t first = first_head * layout.head_dim;
  const int64_t count = layout.kv_heads * layout.head_dim;
  device.ops().write_kv(device.stream(), device.put(columns(tokens.k, first, count)),
                        device.put(columns(tokens.v, first, count)), layout.kv_heads, device.put_column(tokens.slots),
                        cache.layer(layer));
  device.ops().synchronize(device.stream());
}

// What the query heads of the cache's heads get; `group` of them belong to one.
Matrix<float> attend(kernels::Device& device, const Tokens& tokens, const KvCache& cache, int64_t layer,
                     int64_t first_head, int64_t group) {
  const KvLayout& layout = cache.layout();
  const int64_t heads = layout.kv_heads * group;
  const kernels::SequenceRows rows{0, 1, static_cast<int32_t>(tokens.slots.size()) - 1, 0,
                                   static_cast<int32_t>(tokens.blocks.size())};
  const kernels::Tensor out = device.make_f32(1, heads * layout.head_dim);
  const Matrix<float> q = columns(tokens.q, first_head * group * layout.head_dim, heads * layout.head_dim);
  device.ops().attention(device.stream(), device.put(q), heads, layout.kv_heads,
                         1 / std::sqrt(static_cast<float>(layout.head_dim)), std::span(&rows, 1),
                         device.put_column(tokens.blocks), cache.layer(layer), out);
  device.ops().synchronize(device.stream());
  return device.get<float>(out);
}

TEST(KvCachePart, RanksTogetherHaveTheBytesOfOneRank) {
  kernels::Random random(20);
  for (const char* const backend : {"ref", "auto"}) {
    kernels::Device device(backend);
    for (int round = 0; round < 60; ++round) {
      const int32_t ranks = static_cast<int32_t>(random.integer(1, 5));
      const int64_t group = random.integer(1, 3);
      const int64_t num_blocks = random.integer(1, 5);
      const bool is_usual = round % 3 == 0;  // sizes for which there are fast paths
      const KvLayout layout = layout_of(kDTypes[random.integer(0, 2)], ranks * random.integer(1, 3),
                                        is_usual ? 16 * random.integer(1, 4) : random.integer(1, 40),
                                        is_usual ? 16 * random.integer(1, 2) : random.integer(1, 20), random.integer(1, 3));
      SCOPED_TRACE(fmt::format("{} round {}: {} for {} ranks", backend, round, layout.describe(), ranks));
      const KvCache alone(device.ops(), layout, num_blocks);
      const KvCache shared(device.ops(), layout, num_blocks);
      const int64_t layer = random.integer(0, layout.num_layers - 1);
      const Tokens tokens = make_tokens(random, layout, num_blocks, layout.kv_heads * group);
      write(device, tokens, alone, layer, 0);
      const int64_t part_heads = layout.kv_heads / ranks;
      for (const int32_t rank : random.permutation(ranks)) {
        const KvCache part = KvCache::part_of(shared, {rank, ranks});
        ASSERT_TRUE(part.is_part());
        ASSERT_EQ(part.layout(), layout.with_heads(part_heads));
        write(device, tokens, part, layer, rank * part_heads);
      }
      ASSERT_EQ(bytes_of(shared), bytes_of(alone));
      for (int32_t rank = 0; rank < ranks; ++rank) {
        const int64_t first = rank * part_heads;
        const KvCache own(device.ops(), layout.with_heads(part_heads), num_blocks);
        write(device, tokens, own, layer, first);
        ASSERT_EQ(attend(device, tokens, KvCache::part_of(shared, {rank, ranks}), layer, first, group).values,
                  attend(device, tokens, own, layer, first, group).values)
            << "rank " << rank;
      }
    }
  }
}

TEST(KvCachePart, WhatIsMadeUpStaysInsideThePart) {
  kernels::Device device("ref");
  const KvLayout layout = layout_of(DType::kBf16, 4, 6, 5, 2);
  const KvCache whole(device.ops(), layout, 3);
  KvCache second = KvCache::part_of(whole, {1, 4});
  second.fill(BlockId(2), 0.5F);
  size_t found = 0;
  for (const std::byte byte : bytes_of(whole)) found += byte != std::byte{0} ? 1 : 0;
  EXPECT_EQ(found, static_cast<size_t>(layout.num_layers * 5 * 6 * 2));  // 0.5 in bf16 is 0x3f00
  EXPECT_NE(second.block_address(1, BlockId(2))[1], std::byte{0});
}

TEST(KvCachePart, ASecondMappingIsTheSameMemory) {
  for (const int64_t num_blocks : {3, 3000}) {  // of pages, and of huge pages
    kernels::Device device("auto");
    const KvLayout layout = layout_of(DType::kF32, 2, 16, 16, 2);
    const KvCache first(device.ops(), layout, num_blocks, /*shareable=*/true);
    ASSERT_GE(first.shared_fd(), 0);
    Result<std::unique_ptr<kernels::Buffer>> opened =
        device.ops().open_shared(::getpid(), first.shared_fd(), num_blocks * layout.total_block_bytes());
    ASSERT_TRUE(opened.ok()) << opened.error().message;
    const KvCache second(layout, num_blocks, std::move(*opened));
    ASSERT_NE(first.base(), second.base());
    const BlockId last(static_cast<int32_t>(num_blocks - 1));
    first.block_address(1, last)[5] = std::byte{77};
    EXPECT_EQ(second.block_address(1, last)[5], std::byte{77});
    second.block_address(0, BlockId(0))[0] = std::byte{78};
    EXPECT_EQ(first.block_address(0, BlockId(0))[0], std::byte{78});
    const auto refusal = [&](int64_t process, int descriptor, int64_t blocks) {
      return device.ops().open_shared(process, descriptor, blocks * layout.total_block_bytes()).error().message;
    };
    EXPECT_THAT(refusal(::getpid(), first.shared_fd(), 2 * num_blocks + 1000), HasSubstr("same number of KV blocks"));
    const int other = ::open("/dev/null", O_RDWR | O_CLOEXEC);
    EXPECT_THAT(refusal(::getpid(), other, num_blocks), HasSubstr("no seals"));
    ::close(other);
    EXPECT_THAT(refusal(::getpid(), 100'000, num_blocks), HasSubstr("No such file"));
  }
}

}  // namespace
}  // namespace tandem::model
