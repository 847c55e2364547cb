// Dual batch overlap (--enable-dbo): a step of a rank group in two parts, of which one computes while the other one's
// tokens are on their way to their experts. When a step is worth it, and where it is cut.
#pragma once

#include <cstdint>
#include <span>

#include "src/model/batch.h"

namespace tandem::engine {

struct DualBatchLimits {
  bool is_enabled = false;
  // Rows of a step from which on a rank wants two parts: of a step that only generates, and of one with prompt rows.
  int64_t decode_rows = 32;
  int64_t prompt_rows = 512;
};

// Whether a rank with such a step would cut it. Its group does if all ranks would.
bool can_split(const DualBatchLimits& limits, int64_t rows, bool has_prompt_rows);
// The row at which the second part begins: half of the rows or a little more, so that no chunk is cut if that can be
// avoided. 2 rows at least; the second part never has more than half of them.
int32_t choose_split(std::span<const model::Chunk> chunks);

}  // namespace tandem::engine
