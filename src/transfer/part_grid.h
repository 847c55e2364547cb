// How a transfer's KV is cut into pieces that fit into messages. A part is a block of one layer, or a piece of one if
// blocks are larger than a payload. Both sides compute the same grid from the layout and the number of tokens.
#pragma once

#include <algorithm>
#include <cstdint>

#include "src/comm/messenger.h"
#include "src/model/kv_cache.h"

namespace tandem::transfer {

struct PartGrid {
  int64_t num_layers = 0;
  int64_t num_blocks = 0;   // of the whole prompt
  int64_t block_bytes = 0;  // of one layer

  PartGrid() = default;
  PartGrid(const model::KvLayout& layout, int64_t num_tokens)
      : num_layers(layout.num_layers),
        num_blocks((num_tokens + layout.block_size - 1) / layout.block_size),
        block_bytes(layout.block_bytes()) {}

  int64_t parts_per_block() const { return (block_bytes + comm::kMaxPayloadBytes - 1) / comm::kMaxPayloadBytes; }
  int64_t parts_per_layer() const { return num_blocks * parts_per_block(); }
  // As many parts as one message may carry.
  int64_t parts_per_message() const { return std::max<int64_t>(1, comm::kMaxPayloadBytes / block_bytes); }
  // Where a part lies: block index in the prompt, and offset inside the block.
  int64_t block_of(int64_t part) const { return part / parts_per_block(); }
  int64_t offset_of(int64_t part) const { return part % parts_per_block() * comm::kMaxPayloadBytes; }
  int64_t bytes_of(int64_t part) const { return std::min(comm::kMaxPayloadBytes, block_bytes - offset_of(part)); }
  int64_t bytes_of(int64_t first_part, int64_t num_parts) const {
    int64_t bytes = 0;
    for (int64_t part = first_part; part < first_part + num_parts; ++part) bytes += bytes_of(part);
    return bytes;
  }
  int64_t bytes_from(int64_t first_block) const { return num_layers * (num_blocks - first_block) * block_bytes; }
};

}  // namespace tandem::transfer
