#include "src/engine/dual_batch.h"

#include "src/base/check.h"

namespace tandem::engine {
namespace {

// How far behind the middle a cut between two chunks is still worth it: a share of all rows.
constexpr int32_t kTolerance = 8;

}  // namespace

bool can_split(const DualBatchLimits& limits, int64_t rows, bool has_prompt_rows) {
  return limits.is_enabled && rows >= 2 && rows >= (has_prompt_rows ? limits.prompt_rows : limits.decode_rows);
}

int32_t choose_split(std::span<const model::Chunk> chunks) {
  CHECK(!chunks.empty());
  const int32_t rows = chunks.back().first_row + chunks.back().num_rows;
  CHECK_GE(rows, 2);
  const int32_t middle = rows - rows / 2;
  for (const model::Chunk& chunk : chunks) {
    if (chunk.first_row >= middle) return chunk.first_row <= middle + rows / kTolerance ? chunk.first_row : middle;
  }
  return middle;
}

}  // namespace tandem::engine
