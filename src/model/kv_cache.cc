#include "src/model/kv_cache.h"

#include <algorithm>

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

KvCache::KvCache(kernels::Ops& ops, const KvLayout& layout, int64_t num_blocks, bool shareable)
    : layout_(layout), num_blocks_(num_blocks) {
  CHECK_GT(num_blocks, 0);
  CHECK_GT(layout.total_block_bytes(), 0);
  const int64_t bytes = num_blocks * layout.total_block_bytes();
  buffer_ = shareable ? ops.allocate_shareable(bytes) : ops.allocate(bytes);
}

std::byte* KvCache::block_address(int64_t layer, BlockId block) const {
  CHECK_GE(layer, 0);
  CHECK_LT(layer, layout_.num_layers);
  CHECK_GE(block.value, 0);
  CHECK_LT(block.value, num_blocks_);
  return base() + layer * layer_stride_bytes() + block.value * layout_.block_bytes();
}

Status KvCache::populate(int64_t layer, BlockId first, int64_t count) {
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
  return {block_address(index, BlockId(0)), layout_.block_bytes(), layout_.block_size, num_blocks_, layout_.dtype};
}

}  // namespace tandem::model
