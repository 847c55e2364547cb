#include "src/model/quantization.h"

#include "src/base/check.h"

namespace tandem::model {
namespace {

using kernels::WeightFormat;
using kernels::WeightType;

constexpr int64_t kWholeRow = -1;
constexpr int64_t kGroupSizeStep = 32;
constexpr int64_t kMaxGroupSize = 1024;
constexpr int64_t kHeadGroupSize = 128;

// The formats that are made at load. Weights of 8 bits have one scale per row; of 4 bits, w4a8 has groups by default,
// since its activations are rounded per group too and 4-bit rows without groups lose most.
struct LoadFormatRow {
  const char* name;
  WeightFormat format;
};
constexpr LoadFormatRow kLoadFormats[] = {
    {"wint8", {WeightType::kInt8, 0, 16}},
    {"wint4", {WeightType::kInt4, 0, 16}},
    {"w8a8", {WeightType::kInt8, 0, 8}},
    {"w4a8", {WeightType::kInt4, 128, 8}},
};

Status check_group_size(const QuantizationRequest& request, bool takes_groups) {
  const int64_t size = request.group_size;
  if (size == 0) return {};
  if (!takes_groups) {
    return invalid_argument("quantization-group-size",
                            "--quantization-group-size is {}, but --quantization {} takes none; leave it out, or use "
                            "wint4 or w4a8",
                            size, request.name);
  }
  if (size == kWholeRow || (size > 0 && size <= kMaxGroupSize && size % kGroupSizeStep == 0)) return {};
  return invalid_argument("quantization-group-size",
                          "--quantization-group-size is {}, must be -1 (the whole row), 0 (the format's own) or a "
                          "multiple of {} up to {}",
                          size, kGroupSizeStep, kMaxGroupSize);
}

// A name of the checkpoint's own is an assertion.
Status check_stored(const QuantizationRequest& request, const QuantConfig& stored, bool is_dummy) {
  if (is_dummy) {
    return invalid_argument("quantization",
                            "--quantization {} names a checkpoint's format, but --load-format dummy reads none; use "
                            "wint8, wint4, w8a8 or w4a8",
                            request.name);
  }
  if (request.name == stored.method_name()) return {};
  return invalid_argument("quantization",
                          "--quantization is {}, but the checkpoint is {}; use auto, or the right checkpoint",
                          request.name, stored.method_name());
}

// What all layers but the head become.
Result<WeightFormats> choose_linear(const QuantizationRequest& request, const QuantConfig& stored, bool is_dummy,
                                    const WeightFormat& dense) {
  WeightFormats formats;
  formats.dense = dense;
  for (const LoadFormatRow& row : kLoadFormats) {
    if (request.name != row.name) continue;
    TANDEM_TRY(check_group_size(request, row.format.type == WeightType::kInt4));
    WeightFormat linear = row.format;
    if (request.group_size != 0) linear.group_size = request.group_size == kWholeRow ? 0 : request.group_size;
    formats.linear = linear;
    // The last layer decides between neighbouring tokens: 8 bits unless somebody asks for less.
    formats.head = WeightFormat{WeightType::kInt8, 0, row.format.activation_bits};
    return formats;
  }
  TANDEM_TRY(check_group_size(request, false));
  if (request.name != "auto") TANDEM_TRY(check_stored(request, stored, is_dummy));
  return formats;
}

// Takes its activations, and the groups of 4 bits, from the other layers where these are quantised at load.
WeightFormat choose_head(const QuantizationRequest& request, const std::optional<WeightFormat>& linear) {
  WeightFormat head{WeightType::kInt8, 0, linear ? linear->activation_bits : 16};
  if (request.lm_head == "int8") return head;
  CHECK_EQ(request.lm_head, "int4");
  head.type = WeightType::kInt4;
  head.group_size = linear && linear->group_size != 0 ? linear->group_size : kHeadGroupSize;
  return head;
}

}  // namespace

Result<WeightFormats> choose_formats(const QuantizationRequest& request, const QuantConfig& stored, bool is_dummy,
                                     bool has_head, const WeightFormat& dense) {
  TANDEM_ASSIGN(WeightFormats formats, choose_linear(request, stored, is_dummy, dense));
  if (request.lm_head == "auto") return formats;
  if (!has_head) {
    return invalid_argument("lm-head-quantization",
                            "--lm-head-quantization is {}, but the model's head is its embedding "
                            "(tie_word_embeddings), which is not quantised; leave it out",
                            request.lm_head);
  }
  formats.head = choose_head(request, formats.linear);
  formats.head_is_default = false;
  return formats;
}

}  // namespace tandem::model
