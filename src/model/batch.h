// What one step computes: the rows (tokens) of several sequences, and where their KV lies.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "src/base/ids.h"

namespace tandem::model {

// Consecutive tokens of one sequence.
//
// `is_prompt` says which form of MLA attention computes the rows: expanded for prompt tokens, absorbed for generated
// ones. The two forms round differently, so the form is a property of the TOKEN (position < prompt length), never of
// the step that happens to compute it: a generated token recomputed after a preemption is again an absorbed row.
// A chunk therefore never straddles the end of the prompt.
struct Chunk {
  int32_t first_row = 0;       // in the batch
  int32_t num_rows = 0;        // > 0
  int32_t first_position = 0;  // of row first_row in its sequence
  bool is_prompt = true;
  std::vector<BlockId> blocks;  // covers positions 0 … first_position + num_rows - 1
};

struct Batch {
  std::vector<TokenId> tokens;      // [rows]
  std::vector<Chunk> chunks;        // rows in order, without gaps
  std::vector<int32_t> logit_rows;  // rows whose logits are wanted, ascending
  // Not 0: rows from here on are a second part of the step, so that one part computes while the other one's tokens are
  // on their way to their experts (docs/expert-parallel.md). A chunk may lie in both.
  int32_t split_row = 0;
};

// Called on the engine thread when a layer's KV for every row of the batch is in the cache, that of other tensor ranks'
// heads included if they are in the same memory.
using LayerDone = std::function<void(int layer)>;

}  // namespace tandem::model
