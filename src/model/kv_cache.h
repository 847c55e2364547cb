// The memory of the paged KV cache: one region, layer-major, so that consecutive blocks of a layer are contiguous.
// Which block belongs to whom is src/kv's business.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "src/base/ids.h"
#include "src/kernels/ops.h"
#include "src/model/tensor_exchange.h"

namespace tandem::model {

enum class KvKind : uint8_t { kGqa, kMla };

// Everything two workers must agree on before KV may pass between them, and the size of their blocks, which may differ.
struct KvLayout {
  KvKind kind = KvKind::kGqa;
  int64_t num_layers = 0;
  int64_t block_size = 0;                        // tokens per block
  int64_t bytes_per_token = 0;                   // per layer, scales included
  kernels::DType dtype = kernels::DType::kBf16;  // what a block looks like: KvLayerView in src/kernels/ops.h
  int64_t kv_heads = 0;                          // GQA
  int64_t head_dim = 0;                          // GQA
  int64_t latent_dim = 0;                        // MLA
  int64_t rope_dim = 0;                          // MLA

  int64_t block_bytes() const { return block_size * bytes_per_token; }      // one layer
  int64_t total_block_bytes() const { return num_layers * block_bytes(); }  // all layers
  // The same with another number of KV heads: what several tensor ranks have together, or one of them. GQA.
  KvLayout with_heads(int64_t heads) const;
  std::string describe() const;                                             // "mla 6 layers x 16 tokens x 160 B bf16"
  std::string describe_token() const;  // "mla 6 layers x 160 B bf16": what must be equal where KV is handed over
  bool operator==(const KvLayout&) const = default;
};

class KvCache {
 public:
  // `shareable`: other processes of this host may map it, where device and kernel allow that.
  KvCache(kernels::Ops& ops, const KvLayout& layout, int64_t num_blocks, bool shareable = false);
  // In memory that is there already, of layout.total_block_bytes() for each block: another process's cache.
  KvCache(const KvLayout& layout, int64_t num_blocks, std::unique_ptr<kernels::Buffer> memory);
  // What tensor rank `shard` has of a GQA cache of all heads: its heads of every block, which lie side by side there, so
  // that a block of the part is a piece of one of the whole. `whole` outlives it and has a multiple of the heads.
  static KvCache part_of(const KvCache& whole, const TensorShard& shard);

  const KvLayout& layout() const { return layout_; }
  int64_t num_blocks() const { return num_blocks_; }
  // Whether other ranks have the other heads of the same memory, which is then not without gaps.
  bool is_part() const { return is_part_; }
  std::byte* base() const { return base_; }
  int64_t bytes() const { return num_blocks_ * layout_.total_block_bytes(); }
  // As of kernels::Buffer; -1 for a part.
  int shared_fd() const { return buffer_ == nullptr ? -1 : buffer_->shared_fd(); }
  int64_t block_stride_bytes() const { return block_stride_bytes_; }  // block_bytes(), but for a part
  int64_t layer_stride_bytes() const { return num_blocks_ * block_stride_bytes_; }
  // Address of one block of one layer: base + layer * layer_stride + block * block_stride.
  std::byte* block_address(int64_t layer, BlockId block) const;
  kernels::KvLayerView layer(int64_t index) const;
  // Makes the memory of blocks of one layer present (kernels::Buffer::populate); another thread may be using them. Not of
  // a part.
  Status populate(int64_t layer, BlockId first, int64_t count);
  // Makes up the KV of a block, in all layers: every number is `value`; with 8 bits, whose scales lie in the block, 0.
  void fill(BlockId block, float value);

 private:
  KvCache(const KvLayout& layout, int64_t num_blocks, std::byte* base, int64_t block_stride_bytes);

  KvLayout layout_;
  int64_t num_blocks_;
  std::unique_ptr<kernels::Buffer> buffer_;  // null for a part
  std::byte* base_ = nullptr;
  int64_t block_stride_bytes_ = 0;
  bool is_part_ = false;
};

}  // namespace tandem::model
