#include "src/model/kv_cache.h"

#include <algorithm>
#include <utility>

#include "src/base/check.h"
#include "src/kernels/convert.h"

namespace tandem::model {

namespace {

const char* kind_name(KvKind kind) { return kind == KvKind::kMla ? "mla" : "gqa"; }
const char* scales_note(kernels::DType dtype) { return dtype == kernels::DType::kF8E4M3 ? " with scales" : ""; }

}  // namespace

std::string KvLayout::describe() const {
  return fmt::format("{} {} layers x {} tokens x {} B {}{}", kind_name(kind), num_layers, block_size, bytes_per_token,
                     kernels::dtype_name(dtype), scales_note(dtype));
}

std::string KvLayout::describe_token() const {
  return fmt::format("{} {} layers x {} B {}{}", kind_name(kind), num_layers, bytes_per_token,
                     kernels::dtype_name(dtype), scales_note(dtype));
}

KvLayout KvLayout::with_heads(int64_t heads) const {
  CHECK(kind == KvKind::kGqa);
  CHECK_GT(kv_heads, 0);
  CHECK_GT(heads, 0);
  CHECK_EQ(bytes_per_token % kv_heads, 0);
  KvLayout other = *this;
  other.kv_heads = heads;
  other.bytes_per_token = bytes_per_token / kv_heads * heads;
  return other;
}

KvCache::KvCache(kernels::Ops& ops, const KvLayout& layout, int64_t num_blocks, bool shareable)
    : KvCache(layout, num_blocks,
              shareable ? ops.allocate_shareable(num_blocks * layout.total_block_bytes())
                        : ops.allocate(num_blocks * layout.total_block_bytes())) {}

KvCache::KvCache(const KvLayout& layout, int64_t num_blocks, std::unique_ptr<kernels::Buffer> memory)
    : KvCache(layout, num_blocks, memory->address(), layout.block_bytes()) {
  CHECK_EQ(memory->bytes(), num_blocks * layout.total_block_bytes());
  buffer_ = std::move(memory);
}

KvCache::KvCache(const KvLayout& layout, int64_t num_blocks, std::byte* base, int64_t block_stride_bytes)
    : layout_(layout), num_blocks_(num_blocks), base_(base), block_stride_bytes_(block_stride_bytes) {
  CHECK_GT(num_blocks, 0);
  CHECK_GT(layout.total_block_bytes(), 0);
}

// A block of GQA is one head behind the other (KvLayerView in src/kernels/ops.h).
KvCache KvCache::part_of(const KvCache& whole, const TensorShard& shard) {
  CHECK_GE(shard.rank, 0);
  CHECK_LT(shard.rank, shard.size);
  CHECK_EQ(whole.layout_.kv_heads % shard.size, 0);
  const KvLayout layout = whole.layout_.with_heads(whole.layout_.kv_heads / shard.size);
  KvCache part(layout, whole.num_blocks_, whole.base_ + shard.rank * layout.block_bytes(), whole.block_stride_bytes_);
  part.is_part_ = true;
  return part;
}

std::byte* KvCache::block_address(int64_t layer, BlockId block) const {
  CHECK_GE(layer, 0);
  CHECK_LT(layer, layout_.num_layers);
  CHECK_GE(block.value, 0);
  CHECK_LT(block.value, num_blocks_);
  return base() + layer * layer_stride_bytes() + block.value * block_stride_bytes_;
}

Status KvCache::populate(int64_t layer, BlockId first, int64_t count) {
  CHECK(!is_part_);  // what is not there is shared by all: ask the whole cache
  return buffer_->populate(block_address(layer, first) - base(), count * layout_.block_bytes());
}

void KvCache::fill(BlockId block, float value) {
  for (int64_t layer = 0; layer < layout_.num_layers; ++layer) {
    std::byte* const begin = block_address(layer, block);
    std::byte* const end = begin + layout_.block_bytes();
    switch (layout_.dtype) {
      case kernels::DType::kF32:
        std::fill(reinterpret_cast<float*>(begin), reinterpret_cast<float*>(end), value);
        break;
      case kernels::DType::kBf16:
        std::fill(reinterpret_cast<uint16_t*>(begin), reinterpret_cast<uint16_t*>(end),
                  kernels::bf16_from_float(value));
        break;
      default:
        std::fill(begin, end, std::byte{0});
    }
  }
}

kernels::KvLayerView KvCache::layer(int64_t index) const {
  return {block_address(index, BlockId(0)), block_stride_bytes_, layout_.block_size, num_blocks_, layout_.dtype};
}

}  // namespace tandem::model
