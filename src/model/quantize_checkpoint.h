// Writes a quantised copy of a model folder, in the layout of compressed-tensors. It loads to the same bits as
// quantising the original at load.
//
//  int8 with 8-bit activations  weight I8, weight_scale F32                         ("int-quantized")
//  the other integer formats    weight_packed I32, weight_scale F32, weight_shape   ("pack-quantized")
//
// Routers, norms, embedding and the kv_b of MLA are copied as they are; fp8 ones become F32, which loses nothing.
#pragma once

#include <functional>
#include <string>

#include "src/base/result.h"
#include "src/kernels/ops.h"
#include "src/model/quantization.h"

namespace tandem::model {

struct QuantizeOptions {
  std::string source;  // model folder
  std::string target;  // folder to write
  QuantizationRequest quantization;
  bool may_replace = false;  // an existing model folder at `target`
  int64_t max_file_bytes = int64_t{4} << 30;
  std::function<void(double fraction)> on_progress;  // 0 … 1; may be empty
};

struct QuantizedFiles {
  std::string formats;             // as WeightPlan::describe_formats
  int64_t bytes = 0;               // of all tensors
  size_t files = 0;                // of tensors
  bool has_ragged_groups = false;  // other programs cannot read it
};

// `target` appears when everything is written, or not at all. `ops` lends its thread count.
Result<QuantizedFiles> quantize_checkpoint(kernels::Ops& ops, const QuantizeOptions& options);

}  // namespace tandem::model
