#include "src/model/kv_cache.h"

#include "src/base/check.h"

namespace tandem::model {

std::string KvLayout::describe() const {
  return fmt::format("{} {} layers x {} tokens x {} B {}{}", kind == KvKind::kMla ? "mla" : "gqa", num_layers,
                     block_size, bytes_per_token, kernels::dtype_name(dtype),
                     dtype == kernels::DType::kF8E4M3 ? " with scales" : "");
}

KvCache::KvCache(kernels::Ops& ops, const KvLayout& layout, int64_t num_blocks)
    : layout_(layout), num_blocks_(num_blocks) {
  CHECK_GT(num_blocks, 0);
  CHECK_GT(layout.total_block_bytes(), 0);
  buffer_ = ops.allocate(num_blocks * layout.total_block_bytes());
}

std::byte* KvCache::block_address(int64_t layer, BlockId block) const {
  CHECK_GE(layer, 0);
  CHECK_LT(layer, layout_.num_layers);
  CHECK_GE(block.value, 0);
  CHECK_LT(block.value, num_blocks_);
  return base() + layer * layer_stride_bytes() + block.value * layout_.block_bytes();
}

kernels::KvLayerView KvCache::layer(int64_t index) const {
  return {block_address(index, BlockId(0)), layout_.block_bytes(), layout_.block_size, num_blocks_, layout_.dtype};
}

}  // namespace tandem::model
