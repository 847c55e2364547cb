#include "src/model/quantization.h"

#include <gtest/gtest.h>

namespace tandem::model {
namespace {

using kernels::WeightFormat;
using kernels::WeightType;

Result<WeightFormats> choose(const std::string& name, int64_t group_size = 0, bool is_fp8 = false,
                             bool is_dummy = false) {
  QuantConfig stored;
  stored.method = is_fp8 ? QuantMethod::kFp8 : QuantMethod::kNone;
  return choose_formats({name, group_size}, stored, is_dummy, true, kernels::kBf16Weights);
}

TEST(ChooseFormats, FormatsMadeAtLoad) {
  const struct {
    const char* name;
    int64_t group_size;
    WeightFormat linear;
  } cases[] = {
      {"wint8", 0, {WeightType::kInt8, 0, 16}},   {"wint4", 0, {WeightType::kInt4, 0, 16}},
      {"wint4", 64, {WeightType::kInt4, 64, 16}}, {"w8a8", 0, {WeightType::kInt8, 0, 8}},
      {"w4a8", 0, {WeightType::kInt4, 128, 8}},   {"w4a8", 32, {WeightType::kInt4, 32, 8}},
      {"w4a8", -1, {WeightType::kInt4, 0, 8}},
  };
  for (const auto& wanted : cases) {
    SCOPED_TRACE(wanted.name);
    for (const bool is_dummy : {false, true}) {
      const WeightFormats formats = choose(wanted.name, wanted.group_size, !is_dummy, is_dummy).value();
      EXPECT_EQ(formats.linear, wanted.linear);
      EXPECT_EQ(formats.head, (WeightFormat{WeightType::kInt8, 0, wanted.linear.activation_bits}));
      EXPECT_EQ(formats.dense, kernels::kBf16Weights);
    }
  }
}

TEST(ChooseFormats, TheHeadMayHaveAFormatOfItsOwn) {
  const auto head_of = [](const QuantizationRequest& request) {
    return choose_formats(request, {}, false, true, kernels::kBf16Weights).value().head;
  };
  EXPECT_EQ(head_of({"w4a8", 0, "int8"}), (WeightFormat{WeightType::kInt8, 0, 8}));
  EXPECT_EQ(head_of({"w4a8", 0, "int4"}), (WeightFormat{WeightType::kInt4, 128, 8}));
  EXPECT_EQ(head_of({"w4a8", 32, "int4"}), (WeightFormat{WeightType::kInt4, 32, 8}));
  EXPECT_EQ(head_of({"wint4", 0, "int4"}), (WeightFormat{WeightType::kInt4, 128, 16}));  // groups, whatever the others
  EXPECT_EQ(head_of({"w8a8", 0, "int4"}), (WeightFormat{WeightType::kInt4, 128, 8}));
  EXPECT_EQ(head_of({"auto", 0, "int8"}), (WeightFormat{WeightType::kInt8, 0, 16}));
  EXPECT_EQ(head_of({"auto", 0, "int4"}), (WeightFormat{WeightType::kInt4, 128, 16}));
  EXPECT_EQ(choose_formats({"auto", 0, "int4"}, {}, false, false, kernels::kBf16Weights).error().message,
            "--lm-head-quantization is int4, but the model's head is its embedding (tie_word_embeddings), which is not "
            "quantised; leave it out");
}

TEST(ChooseFormats, OtherNamesKeepWhatIsStored) {
  EXPECT_FALSE(choose("auto").value().linear.has_value());
  EXPECT_FALSE(choose("auto", 0, true).value().head.has_value());
  EXPECT_FALSE(choose("fp8", 0, true).value().linear.has_value());
  EXPECT_EQ(choose("fp8").error().message,
            "--quantization is fp8, but the checkpoint is not quantised; use auto, or the right checkpoint");
  EXPECT_EQ(choose("awq", 0, true).error().message,
            "--quantization is awq, but the checkpoint is fp8; use auto, or the right checkpoint");
  EXPECT_EQ(choose("fp8", 0, true, true).error().message,
            "--quantization fp8 names a checkpoint's format, but --load-format dummy reads none; use wint8, wint4, "
            "w8a8 or w4a8");
}

TEST(ChooseFormats, GroupSizesMustFit) {
  EXPECT_EQ(choose("w8a8", 64).error().message,
            "--quantization-group-size is 64, but --quantization w8a8 takes none; leave it out, or use wint4 or w4a8");
  EXPECT_FALSE(choose("auto", -1).ok());
  for (const int64_t size : {-2, 1, 48, 1056}) {
    EXPECT_EQ(choose("wint4", size).error().message,
              fmt::format("--quantization-group-size is {}, must be -1 (the whole row), 0 (the format's own) or a "
                          "multiple of 32 up to 1024",
                          size));
  }
}

}  // namespace
}  // namespace tandem::model
