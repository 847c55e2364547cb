// The map of blocks against the kernels themselves: the same tokens are written, one by one, into caches of both block
// sizes; what the map makes of the first must be the second, bit for bit.
#include "src/transfer/block_map.h"

#include <gtest/gtest.h>

#include <cstring>

#include "src/kernels/shapes.h"
#include "src/kernels/test_support.h"
#include "src/transfer/test_support.h"

namespace tandem::transfer {
namespace {

using kernels::DType;

struct Shape {
  model::KvKind kind;
  DType dtype;
  int64_t heads;  // GQA
  int64_t dim;    // of a head, or of the latent
  int64_t rope_dim;
};

constexpr Shape kShapes[] = {
    {model::KvKind::kGqa, DType::kBf16, 2, 8, 0},   {model::KvKind::kGqa, DType::kF32, 1, 6, 0},
    {model::KvKind::kGqa, DType::kF8E4M3, 2, 4, 0}, {model::KvKind::kGqa, DType::kBf16, 2, 5, 0},
    {model::KvKind::kGqa, DType::kF8E4M3, 3, 7, 0}, {model::KvKind::kGqa, DType::kF32, 2, 1, 0},
    {model::KvKind::kMla, DType::kBf16, 0, 8, 4},   {model::KvKind::kMla, DType::kF32, 0, 5, 3},
    {model::KvKind::kMla, DType::kF8E4M3, 0, 8, 4},
};

constexpr int64_t kSizes[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 33, 64, 256};

model::KvLayout layout_of(const Shape& shape, int64_t block_size) {
  model::KvLayout layout;
  layout.kind = shape.kind;
  layout.dtype = shape.dtype;
  layout.num_layers = 1;
  layout.block_size = block_size;
  if (shape.kind == model::KvKind::kGqa) {
    layout.kv_heads = shape.heads;
    layout.head_dim = shape.dim;
    layout.bytes_per_token = 2 * shape.heads * kernels::cached_vector_bytes(shape.dtype, shape.dim);
  } else {
    layout.latent_dim = shape.dim;
    layout.rope_dim = shape.rope_dim;
    layout.bytes_per_token = kernels::cached_latent_bytes(shape.dtype, shape.dim, shape.rope_dim);
  }
  return layout;
}

// A cache in which block i of a prompt is block i, with the tokens written by the kernels, and zeros elsewhere.
class Written {
 public:
  Written(kernels::Device& device, const Shape& shape, int64_t block_size, const kernels::Matrix<float>& keys,
          const kernels::Matrix<float>& values)
      : layout(layout_of(shape, block_size)),
        num_blocks((keys.rows + block_size - 1) / block_size),
        cache_(device.ops(), layout, num_blocks) {
    std::memset(cache_.base(), 0, static_cast<size_t>(cache_.bytes()));
    std::vector<int64_t> slots(static_cast<size_t>(keys.rows));
    std::iota(slots.begin(), slots.end(), 0);
    if (shape.kind == model::KvKind::kGqa) {
      device.ops().write_kv(device.stream(), device.put(keys), device.put(values), shape.heads,
                            device.put_column(slots), cache_.layer(0));
    } else {
      device.ops().write_latent(device.stream(), device.put(keys), device.put(values), device.put_column(slots),
                                cache_.layer(0));
    }
    device.ops().synchronize(device.stream());
  }
  const std::byte* at(int64_t block, int64_t offset) const {
    return cache_.base() + block * layout.block_bytes() + offset;
  }
  std::vector<std::byte> all() const { return {cache_.base(), cache_.base() + cache_.bytes()}; }

  const model::KvLayout layout;
  const int64_t num_blocks;

 private:
  model::KvCache cache_;
};

// What the map makes of `from`, whose blocks are cut at random places. No byte may have two places.
std::vector<std::byte> convert(const Written& from, const Written& to, std::mt19937_64& random) {
  const BlockMap map(from.layout, to.layout);
  std::vector<std::byte> bytes(to.all().size(), std::byte{0});
  std::vector<bool> has(bytes.size(), false);
  for (int64_t block = 0; block < from.num_blocks; ++block) {
    for (int64_t begin = 0; begin < from.layout.block_bytes();) {
      const int64_t left = from.layout.block_bytes() - begin;
      const int64_t end = begin + (random() % 2 == 0 ? left : 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(left)));
      std::vector<CopyRun> runs;
      map.find(block, begin, end, runs);
      for (const CopyRun& run : runs) {
        EXPECT_GT(run.bytes, 0);
        EXPECT_LE(run.offset + run.bytes, to.layout.block_bytes());
        for (int64_t i = 0; i < run.bytes && run.block < to.num_blocks; ++i) {
          const size_t place = static_cast<size_t>(run.block * to.layout.block_bytes() + run.offset + i);
          EXPECT_FALSE(has[place]);
          has[place] = true;
          bytes[place] = *from.at(block, begin + i);
        }
        begin += run.bytes;
      }
      EXPECT_EQ(begin, end);
      begin = end;
    }
  }
  return bytes;
}

TEST(BlockMap, GivesWhatTheKernelsWriteIntoBlocksOfTheOtherSize) {
  std::mt19937_64 random(kFirstSeed);
  std::printf("seed %lu\n", static_cast<unsigned long>(kFirstSeed));
  kernels::Random numbers(kFirstSeed);
  for (const Shape& shape : kShapes) {
    kernels::Device device("ref");
    const bool gqa = shape.kind == model::KvKind::kGqa;
    const int64_t most = 2 * 256 + 1;
    const kernels::Matrix<float> keys = numbers.matrix(most, gqa ? shape.heads * shape.dim : shape.dim);
    const kernels::Matrix<float> values = numbers.matrix(most, gqa ? shape.heads * shape.dim : shape.rope_dim);
    for (const int64_t from : kSizes) {
      for (const int64_t to : kSizes) {
        // Some lengths around the ends of both sides' blocks.
        const int64_t larger = std::max(from, to);
        for (const int64_t tokens : {int64_t{1}, larger - 1, larger, larger + 1, 2 * larger}) {
          if (tokens < 1) continue;
          const Written source(device, shape, from, keys.rows_slice(0, tokens), values.rows_slice(0, tokens));
          const Written target(device, shape, to, keys.rows_slice(0, tokens), values.rows_slice(0, tokens));
          ASSERT_EQ(convert(source, target, random), target.all())
              << source.layout.describe() << " to " << to << ", " << tokens << " tokens";
        }
      }
    }
  }
}

TEST(BlockMap, EqualBlocksAreOneRun) {
  const model::KvLayout layout = layout_of(kShapes[2], 16);
  std::vector<CopyRun> runs;
  const BlockMap map(layout, layout);
  map.find(3, 0, layout.block_bytes(), runs);
  ASSERT_EQ(runs.size(), 1U);
  EXPECT_EQ(runs[0].block, 3);
  EXPECT_EQ(runs[0].offset, 0);
  EXPECT_EQ(runs[0].bytes, layout.block_bytes());
  EXPECT_TRUE(map.is_by_token());
}

TEST(BlockMap, BlocksOfWholeTokensAreCutOnlyAtTheirEnds) {
  const BlockMap map(layout_of(kShapes[6], 64), layout_of(kShapes[6], 16));
  std::vector<CopyRun> runs;
  map.find(1, 0, 64 * 24, runs);
  ASSERT_EQ(runs.size(), 4U);
  for (int64_t i = 0; i < 4; ++i) EXPECT_EQ(runs[static_cast<size_t>(i)].block, 4 + i);
  EXPECT_TRUE(map.is_by_token());
}

}  // namespace
}  // namespace tandem::transfer
