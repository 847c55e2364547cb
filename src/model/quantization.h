// What --quantization asks for, and the format that each kind of weight is therefore packed to.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "src/base/result.h"
#include "src/kernels/ops.h"
#include "src/model/quant_config.h"

namespace tandem::model {

// The options of that name.
struct QuantizationRequest {
  std::string name = "auto";
  int64_t group_size = 0;  // columns per scale of a 4-bit format; 0: the format's own, -1: the whole row
  std::string lm_head = "auto";  // or "int8" or "int4"
};

struct WeightFormats {
  kernels::WeightFormat dense = kernels::kBf16Weights;  // embedding, kv_b of MLA, and all that is not quantised
  // Set if weights are quantised at load; otherwise they stay as the checkpoint stores them.
  std::optional<kernels::WeightFormat> linear;
  std::optional<kernels::WeightFormat> head;
  bool head_is_default = true;  // nobody asked for `head`, so integers in the checkpoint stay as they are
};

// Checks the request against what the checkpoint holds (`is_dummy`: there is none; `has_head`: its output head is not
// the embedding).
Result<WeightFormats> choose_formats(const QuantizationRequest& request, const QuantConfig& stored, bool is_dummy,
                                     bool has_head, const kernels::WeightFormat& dense);

}  // namespace tandem::model
