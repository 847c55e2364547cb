// How a transfer's KV is cut into pieces that fit into messages. A part is a block of one layer, or a piece of one if
// blocks are larger than a payload. The blocks are the sender's: both sides compute the same grid from its layout and the
// number of tokens, and a receiver with blocks of another size finds the places by BlockMap.
#pragma once

#include <algorithm>
#include <cstdint>

#include "src/comm/messenger.h"
#include "src/model/kv_cache.h"

namespace tandem::transfer {

struct PartGrid {
  int64_t num_layers = 0;
  int64_t num_tokens = 0;   // of the whole prompt
  int64_t block_tokens = 1;
  int64_t num_blocks = 0;
  int64_t block_bytes = 0;  // of one layer
  int64_t max_part_bytes = comm::kMaxPayloadBytes;  // the messenger's largest payload

  PartGrid() = default;
  PartGrid(const model::KvLayout& layout, int64_t tokens, int64_t max_payload_bytes = comm::kMaxPayloadBytes)
      : num_layers(layout.num_layers),
        num_tokens(tokens),
        block_tokens(layout.block_size),
        num_blocks((tokens + layout.block_size - 1) / layout.block_size),
        block_bytes(layout.block_bytes()),
        max_part_bytes(max_payload_bytes) {}

  int64_t parts_per_block() const { return (block_bytes + max_part_bytes - 1) / max_part_bytes; }
  int64_t parts_per_layer() const { return num_blocks * parts_per_block(); }
  // As many parts as one message may carry.
  int64_t parts_per_message() const { return std::clamp<int64_t>(max_part_bytes / block_bytes, 1, comm::kMaxPieces); }
  // Where a part lies: block index in the prompt, and offset inside the block.
  int64_t block_of(int64_t part) const { return part / parts_per_block(); }
  int64_t offset_of(int64_t part) const { return part % parts_per_block() * max_part_bytes; }
  int64_t bytes_of(int64_t part) const { return std::min(max_part_bytes, block_bytes - offset_of(part)); }
  int64_t bytes_of(int64_t first_part, int64_t num_parts) const {
    int64_t bytes = 0;
    for (int64_t part = first_part; part < first_part + num_parts; ++part) bytes += bytes_of(part);
    return bytes;
  }
  // The first block that is needed by who lacks the tokens from `first_token` on: num_blocks if it lacks none.
  int64_t first_block(int64_t first_token) const {
    return first_token >= num_tokens ? num_blocks : first_token / block_tokens;
  }
  int64_t bytes_from(int64_t first_block) const { return num_layers * (num_blocks - first_block) * block_bytes; }
};

}  // namespace tandem::transfer
