#include "src/model/step.h"

#include <algorithm>

namespace tandem::model {
namespace {

using kernels::DType;

int64_t blocks_for(int64_t positions, int64_t block_size) { return (positions + block_size - 1) / block_size; }

}  // namespace

StepUploader::StepUploader(kernels::Ops& ops, kernels::Stream& stream, const StepLimits& limits)
    : ops_(ops),
      stream_(stream),
      limits_(limits),
      tokens_device_(ops, DType::kI32, limits.max_rows, 1),
      positions_device_(ops, DType::kI32, limits.max_rows, 1),
      slots_device_(ops, DType::kI64, limits.max_rows, 1),
      block_table_device_(
          ops, DType::kI32,
          std::min(limits.max_chunks, limits.max_rows) * blocks_for(limits.max_positions, limits.block_size), 1),
      logit_rows_device_(ops, DType::kI32, limits.max_chunks, 1) {}

UploadedBatch StepUploader::upload(const Batch& batch, const KvCache& cache) {
  CHECK_LE(static_cast<int64_t>(batch.tokens.size()), limits_.max_rows);
  CHECK_LE(static_cast<int64_t>(batch.chunks.size()), limits_.max_chunks);
  CHECK_LE(static_cast<int64_t>(batch.logit_rows.size()), limits_.max_chunks);
  for (const TokenId token : batch.tokens) {
    CHECK_GE(token, 0);
    CHECK_LT(token, limits_.vocab_size);
  }
  positions_.clear();
  slots_.clear();
  block_table_.clear();
  const int64_t rows = std::ssize(batch.tokens);
  const int32_t split = batch.split_row;
  CHECK_GE(split, 0);
  CHECK(split == 0 || split < rows);
  for (Step& part : parts_) {
    part.sequences.clear();
    part.is_prompt.clear();
  }
  parts_[0].first_row = 0;
  parts_[0].rows = split == 0 ? rows : split;
  parts_[1].first_row = split;
  parts_[1].rows = split == 0 ? 0 : rows - split;
  for (const Chunk& chunk : batch.chunks) add_chunk(chunk, cache, split);
  CHECK_EQ(positions_.size(), batch.tokens.size());
  CHECK(std::is_sorted(batch.logit_rows.begin(), batch.logit_rows.end()));
  CHECK(batch.logit_rows.empty() || batch.logit_rows.front() >= 0);
  CHECK(batch.logit_rows.empty() || static_cast<size_t>(batch.logit_rows.back()) < batch.tokens.size());

  const kernels::Tensor tokens = tokens_device_.upload<TokenId>(ops_, stream_, batch.tokens);
  const kernels::Tensor positions = positions_device_.upload<int32_t>(ops_, stream_, positions_);
  const kernels::Tensor slots = slots_device_.upload<int64_t>(ops_, stream_, slots_);
  const kernels::Tensor block_table = block_table_device_.upload<int32_t>(ops_, stream_, block_table_);
  for (Step& part : parts_) {
    part.tokens = tokens.row_slice(part.first_row, part.rows);
    part.positions = positions.row_slice(part.first_row, part.rows);
    part.slots = slots.row_slice(part.first_row, part.rows);
    part.block_table = block_table;
  }
  UploadedBatch uploaded;
  uploaded.rows = rows;
  uploaded.parts = std::span(parts_).first(split == 0 ? 1 : 2);
  uploaded.logit_rows = logit_rows_device_.upload<int32_t>(ops_, stream_, batch.logit_rows);
  return uploaded;
}

void StepUploader::add_chunk(const Chunk& chunk, const KvCache& cache, int32_t split_row) {
  const int32_t end = chunk.first_position + chunk.num_rows;
  CHECK_EQ(static_cast<size_t>(chunk.first_row), positions_.size());
  CHECK_GT(chunk.num_rows, 0);
  CHECK_GE(chunk.first_position, 0);
  CHECK_LE(end, limits_.max_positions);
  const int64_t needed = blocks_for(end, limits_.block_size);
  CHECK_GE(static_cast<int64_t>(chunk.blocks.size()), needed);
  first_block_ = static_cast<int32_t>(block_table_.size());
  for (int64_t i = 0; i < needed; ++i) {
    const int32_t block = chunk.blocks[static_cast<size_t>(i)].value;
    CHECK_GE(block, 0);
    CHECK_LT(block, cache.num_blocks());
    block_table_.push_back(block);
  }
  for (int32_t position = chunk.first_position; position < end; ++position) {
    const int64_t block = chunk.blocks[static_cast<size_t>(position / limits_.block_size)].value;
    positions_.push_back(position);
    slots_.push_back(block * limits_.block_size + position % limits_.block_size);
  }
  const int32_t end_row = chunk.first_row + chunk.num_rows;
  const int32_t cut = split_row == 0 ? end_row : std::clamp(split_row, chunk.first_row, end_row);
  add_rows(parts_[0], chunk, chunk.first_row, cut);
  add_rows(parts_[1], chunk, cut, end_row);
}

// The chunk's rows first … end of the batch, which lie in `part`; maybe none.
void StepUploader::add_rows(Step& part, const Chunk& chunk, int32_t first, int32_t end) {
  if (first == end) return;
  const int32_t position = chunk.first_position + first - chunk.first_row;
  const int64_t num_blocks = blocks_for(int64_t{position} + end - first, limits_.block_size);
  part.sequences.push_back({first - static_cast<int32_t>(part.first_row), end - first, position, first_block_,
                            static_cast<int32_t>(num_blocks)});
  part.is_prompt.push_back(chunk.is_prompt);
}

}  // namespace tandem::model
