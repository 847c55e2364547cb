#include "src/model/quant_config.h"

#include "src/model/config.h"
#include "src/model/layout_test_support.h"

namespace tandem::model {
namespace {

QuantConfig must_read(const std::string& quantization) {
  const TempDir dir;
  dir.write("config.json", config_with("qwen_base", quantization));
  return load_config(dir.path()).value().quant;
}

std::string error_of(const std::string& quantization) {
  const TempDir dir;
  dir.write("config.json", config_with("qwen_base", quantization));
  const Result<ModelConfig> config = load_config(dir.path());
  return config.ok() ? "no error" : config.error().message;
}

TEST(QuantConfig, ChoosesTheSchemeOfAModule) {
  const QuantConfig quant = must_read(R"({
      "quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["re:.*mlp\\.gate$", "model.special"],
      "config_groups": {
        "group_0": {"targets": ["Linear"], "format": "pack-quantized",
                    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": false}},
        "group_1": {"targets": ["re:.*self_attn\\.[qk]_proj", "lm_head"], "format": "int-quantized",
                    "input_activations": {"num_bits": 8, "dynamic": true, "strategy": "token"},
                    "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
        "group_2": {"targets": ["re:.*o_proj"], "format": "float-quantized",
                    "input_activations": {"num_bits": 8, "type": "float", "dynamic": true, "strategy": "token"},
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}})");
  EXPECT_EQ(quant.method_name(), "compressed-tensors");
  const QuantScheme* expert = quant.scheme_of("model.layers.0.mlp.experts.3.up_proj");
  ASSERT_NE(expert, nullptr);
  EXPECT_EQ(expert->describe(), "int4 g64 a16 with zero points");
  EXPECT_EQ(expert->layout, QuantLayout::kWords);
  for (const char* module : {"model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.k_proj", "lm_head"}) {
    ASSERT_NE(quant.scheme_of(module), nullptr);
    EXPECT_EQ(quant.scheme_of(module)->describe(), "int8 a8");
    EXPECT_EQ(quant.scheme_of(module)->layout, QuantLayout::kBytes);
  }
  EXPECT_EQ(quant.scheme_of("model.layers.0.self_attn.o_proj")->block_n, 1);
  EXPECT_EQ(quant.scheme_of("model.layers.0.mlp.gate"), nullptr);
  EXPECT_NE(quant.scheme_of("model.layers.0.mlp.gate_proj"), nullptr);
  EXPECT_EQ(quant.scheme_of("model.special"), nullptr);
  EXPECT_NE(quant.scheme_of("model.specially"), nullptr);
}

TEST(QuantConfig, ReadsTheOtherMethods) {
  const QuantConfig awq = must_read(
      R"({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM", "modules_to_not_convert": ["gate"]})");
  EXPECT_EQ(awq.method_name(), "awq");
  EXPECT_EQ(awq.scheme_of("model.layers.0.mlp.gate"), nullptr);
  EXPECT_EQ(awq.scheme_of("model.layers.0.self_attn.q_proj")->group_size, 64);
  const QuantConfig gptq = must_read(
      R"({"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": false, "sym": true, "dynamic": {"-:.*gate": {}}})");
  EXPECT_EQ(gptq.scheme_of("lm_head")->describe(), "int8 a16");
  EXPECT_TRUE(gptq.scheme_of("lm_head")->zeros_are_less_one);
  EXPECT_FALSE(must_read(R"({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"})")
                   .rules.at(0)
                   .scheme.zeros_are_less_one);
}

TEST(QuantConfig, ReadsFilesBesideTheConfig) {
  const TempDir old_gptq;
  old_gptq.write("config.json", config_with("qwen_base", ""));
  old_gptq.write("quantize_config.json", R"({"bits": 4, "group_size": 128, "desc_act": false, "sym": true})");
  EXPECT_EQ(load_config(old_gptq.path()).value().quant.method_name(), "gptq");
  const TempDir ascend;
  ascend.write("config.json", config_with("qwen_base", ""));
  ascend.write("quant_model_description.json",
               R"({"version": "1.0.0", "group_size": 0, "optional": {"x": 1}, "a.q_proj.weight": "W8A8_DYNAMIC",
                   "a.q_proj.weight_scale": "W8A8_DYNAMIC", "a.gate.weight": "FLOAT"})");
  const QuantConfig quant = load_config(ascend.path()).value().quant;
  EXPECT_EQ(quant.method_name(), "ascend");
  EXPECT_EQ(quant.scheme_of("a.q_proj")->describe(), "int8 a8");
  EXPECT_EQ(quant.scheme_of("a.gate"), nullptr);
  EXPECT_EQ(quant.scheme_of("a.other"), nullptr);
  ascend.write("quant_model_description.json", R"({"a.q_proj.weight": "W8A8"})");
  EXPECT_THAT(load_config(ascend.path()).error().message,
              testing::HasSubstr("quant_model_description.json: a.q_proj.weight is \"W8A8\", must be FLOAT or "
                                 "W8A8_DYNAMIC"));
}

TEST(QuantConfig, RefusesWhatIsNotRead) {
  const std::string packed = compressed_config("pack-quantized", 4, 32, true, true);
  const std::string gptq = R"({"quant_method": "gptq", "bits": 4, "group_size": 128})";
  const std::string awq = R"({"quant_method": "awq", "bits": 4, "group_size": 128})";
  const struct {
    std::string quantization;
    const char* message;
  } cases[] = {
      {R"({"quant_method": "bitsandbytes"})", "quant_method is \"bitsandbytes\", must be fp8, compressed-tensors, awq"},
      {replaced(packed, R"("num_bits": 4)", R"("num_bits": 3)"), "weights.num_bits is 3, must be 8 or 4"},
      {replaced(packed, R"("type": "int", "symmetric")", R"("type": "uint", "symmetric")"), "input_activations.type is \"uint\", must be \"int\""},
      {replaced(packed, "\"group\"", "\"tensor_group\""), "weights.strategy is \"tensor_group\""},
      {replaced(packed, R"("group_size": 32)", R"("group_size": 24)"), "weights.group_size is 24, must be -1"},
      {replaced(packed, R"("group_size": 32)", R"("actorder": "group")"),
       "weights.actorder is \"group\", which reorders"},
      {replaced(packed, R"("dynamic": true)", R"("dynamic": false)"),
       "input_activations.dynamic is false, must be true"},
      {replaced(packed, R"("num_bits": 8)", R"("num_bits": 4)"), "input_activations.num_bits is 4, must be 8"},
      {replaced(packed, "pack-quantized", "marlin-24"), "format is missing, must be \"int-quantized\""},
      {replaced(packed, "pack-quantized", "int-quantized"), "must be \"int-quantized\" (8 bits)"},
      {replaced(packed, R"("re:.*mlp\\.gate$")", R"("re:(?<x")"), "ignore is ["},
      {replaced(packed, R"("re:.*mlp\\.gate$")", "\"re:" + std::string(300, 'a') + "\""), "must have at most 256"},
      {replaced(packed, R"("ignore")", R"("transform_config": {"R1": {}}, "ignore")"), "rotations are not supported"},
      {replaced(gptq, "4", "3"), "bits is 3, must be 4 or 8"},
      {replaced(gptq, "128", "100"), "group_size is 100, must be -1 (one group per row) or a multiple of 16"},
      {replaced(gptq, "128", R"(128, "dynamic": {"+:.*down.*": {"bits": 8}})"),
       "which changes the scheme of some layers"},
      {replaced(gptq, "128", R"(128, "checkpoint_format": "marlin")"), "checkpoint_format is \"marlin\""},
      {replaced(awq, "4", "8"), "bits is 8, must be 4"},
      {replaced(awq, "128", R"(128, "version": "gemv")"), "version is \"gemv\", must be \"gemm\""},
      {replaced(awq, "128", R"(128, "zero_point": false)"), "zero_point is false, must be true"},
  };
  for (const auto& bad : cases) {
    const std::string error = error_of(bad.quantization);
    EXPECT_THAT(error, testing::HasSubstr(bad.message)) << bad.quantization;
    EXPECT_EQ(error.find('\n'), std::string::npos);
  }
}

// An expression that takes a backtracking matcher for ever.
TEST(QuantConfig, ExpressionsTakePolynomialTime) {
  const ModulePattern pattern = ModulePattern::parse("re:(a+)+b").value();
  EXPECT_FALSE(pattern.matches(std::string(2000, 'a')));
  EXPECT_TRUE(pattern.matches(std::string(2000, 'a') + "b"));
}

}  // namespace
}  // namespace tandem::model
