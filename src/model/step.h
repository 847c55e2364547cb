// One Batch as the device sees it: positions, cache slots and block tables, checked and uploaded once per step; in one
// part, or in two that go through the layers one behind the other.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "src/kernels/ops.h"
#include "src/model/batch.h"
#include "src/model/device_tensor.h"
#include "src/model/kv_cache.h"

namespace tandem::model {

// A part of a step, ready to be computed. Views are valid until the next StepUploader::upload.
struct Step {
  int64_t first_row = 0;                         // in the batch
  int64_t rows = 0;
  kernels::Tensor tokens;                        // I32 [rows, 1]
  kernels::Tensor positions;                     // I32 [rows, 1]
  kernels::Tensor slots;                         // I64 [rows, 1]: block * block_size + offset
  kernels::Tensor block_table;                   // I32 [blocks of all chunks, 1]
  std::vector<kernels::SequenceRows> sequences;  // one per chunk, in order; rows count from first_row
  std::vector<bool> is_prompt;                   // of each of them
};

struct UploadedBatch {
  int64_t rows = 0;
  std::span<const Step> parts;  // one or two
  kernels::Tensor logit_rows;   // I32 [wanted rows, 1], of the batch
};

struct StepLimits {
  int64_t max_rows = 0;
  int64_t max_chunks = 0;     // also of wanted rows
  int64_t max_positions = 0;  // of one sequence
  int64_t vocab_size = 0;
  int64_t block_size = 0;
};

class StepUploader {
 public:
  StepUploader(kernels::Ops& ops, kernels::Stream& stream, const StepLimits& limits);

  // CHECKs the batch against the limits: a bad one is a bug of the engine.
  UploadedBatch upload(const Batch& batch, const KvCache& cache);

 private:
  void add_chunk(const Chunk& chunk, const KvCache& cache, int32_t split_row);
  void add_rows(Step& part, const Chunk& chunk, int32_t first, int32_t end);

  kernels::Ops& ops_;
  kernels::Stream& stream_;
  StepLimits limits_;
  std::array<Step, 2> parts_;
  std::vector<int32_t> positions_;
  std::vector<int64_t> slots_;
  std::vector<int32_t> block_table_;  // of all chunks
  int32_t first_block_ = 0;           // of the chunk that is added, in block_table_
  DeviceTensor tokens_device_;
  DeviceTensor positions_device_;
  DeviceTensor slots_device_;
  DeviceTensor block_table_device_;
  DeviceTensor logit_rows_device_;
};

}  // namespace tandem::model
