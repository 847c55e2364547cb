// `tandem quantize` and quantising at load are one and the same model.
#include "src/model/quantize_checkpoint.h"

#include <nlohmann/json.hpp>

#include "src/model/checkpoint.h"
#include "src/model/layout_test_support.h"

namespace tandem::model {
namespace {

namespace fs = std::filesystem;

const std::vector<TokenId> kTokens{3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8};

struct QuantizeCase {
  const char* golden;
  QuantizationRequest request;
};

std::vector<QuantizeCase> quantize_cases() {
  std::vector<QuantizeCase> cases;
  for (const char* golden : {"qwen_base", "qwen_fp8", "qwen_tied", "ds_base", "ds_fp8", "ds_group1_mtp"}) {
    for (const QuantizationRequest& request :
         {QuantizationRequest{"wint8", 0}, {"wint4", 0}, {"wint4", 32}, {"w8a8", 0}, {"w4a8", 0}}) {
      cases.push_back({golden, request});
    }
    if (std::string_view(golden) == "qwen_tied") continue;
    for (const char* format : {"w8a8", "wint4"}) cases.push_back({golden, {format, 0, "int4"}});
  }
  return cases;
}

std::string case_name(const testing::TestParamInfo<QuantizeCase>& test) {
  const QuantizationRequest& request = test.param.request;
  return fmt::format("{}_{}_g{}{}", test.param.golden, request.name, request.group_size,
                     request.lm_head == "auto" ? "" : "_head_" + request.lm_head);
}

class QuantizeTest : public testing::TestWithParam<QuantizeCase> {
 protected:
  Sequences::Logits logits_of(const std::string& path, const QuantizationRequest& request, ComputeType compute) {
    LoadOptions options = golden_options(path, compute);
    options.quantization = request;
    const std::unique_ptr<Model> model = must_load(*ops_, options);
    Sequences sequences(*ops_, *model, {kTokens});
    sequences.run(0, 8, 8);
    return sequences.logits(0);
  }
  QuantizeOptions options(const std::string& target) const {
    QuantizeOptions options;
    options.source = golden_path(GetParam().golden);
    options.target = target;
    options.quantization = GetParam().request;
    return options;
  }

  const std::unique_ptr<kernels::Ops> ops_ = must_make_ops("auto", 2);
  TempDir dir_;
};

TEST_P(QuantizeTest, LoadsToTheBitsOfQuantisingAtLoad) {
  const std::string target = dir_.path() + "/out";
  QuantizeOptions request = options(target);
  request.max_file_bytes = 30'000;  // so that there are several files
  const QuantizedFiles files = quantize_checkpoint(*ops_, request).value();
  EXPECT_GT(files.files, 1U);
  for (const ComputeType compute : {ComputeType::kBf16, ComputeType::kF32}) {
    const Sequences::Logits at_load = logits_of(golden_path(GetParam().golden), GetParam().request, compute);
    EXPECT_EQ(logits_of(target, {"auto", 0}, compute), at_load);
    EXPECT_EQ(logits_of(target, {"compressed-tensors", 0}, compute), at_load);
    EXPECT_NE(logits_of(golden_path(GetParam().golden), {"auto", 0}, compute), at_load);
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, QuantizeTest, testing::ValuesIn(quantize_cases()), case_name);

class QuantizeFilesTest : public testing::Test {
 protected:
  QuantizeFilesTest() {
    options_.source = dir_.path() + "/source";
    options_.target = dir_.path() + "/target";
    options_.quantization.name = "w8a8";
    fs::copy(golden_path("qwen_base"), options_.source);
  }
  std::string error() {
    const Result<QuantizedFiles> result = quantize_checkpoint(*ops_, options_);
    return result.ok() ? "no error" : result.error().message;
  }

  const std::unique_ptr<kernels::Ops> ops_ = must_make_ops("ref");
  TempDir dir_;
  QuantizeOptions options_;
};

TEST_F(QuantizeFilesTest, ReplacesNoFile) {
  for (const std::string content : {"", "anything"}) {
    std::ofstream(options_.target) << content;
    for (const bool may_replace : {false, true}) {
      options_.may_replace = may_replace;
      EXPECT_THAT(error(), testing::HasSubstr("/target: is a file, and a model is a folder"));
    }
    EXPECT_EQ(read_text(options_.target), content);
  }
}

TEST_F(QuantizeFilesTest, WritesTheLayoutAndTheOtherFiles) {
  std::ofstream(options_.source + "/tokenizer.json") << "{}";
  std::ofstream(options_.source + "/pytorch_model.bin") << "old";
  ASSERT_EQ(error(), "no error");
  EXPECT_EQ(read_text(options_.target + "/tokenizer.json"), "{}");
  EXPECT_FALSE(fs::exists(options_.target + "/pytorch_model.bin"));
  const nlohmann::json config = nlohmann::json::parse(read_text(options_.target + "/config.json"));
  const nlohmann::json& quantization = config["quantization_config"];
  EXPECT_EQ(quantization["quant_method"], "compressed-tensors");
  EXPECT_EQ(quantization["format"], "int-quantized");
  EXPECT_EQ(quantization["config_groups"]["group_0"]["weights"]["num_bits"], 8);
  EXPECT_EQ(quantization["config_groups"]["group_0"]["input_activations"]["strategy"], "token");
  const std::unique_ptr<Checkpoint> checkpoint = Checkpoint::open(options_.target).value();
  const std::string module = "model.layers.0.mlp.experts.1.up_proj";
  ASSERT_NE(checkpoint->find(module + ".weight"), nullptr);
  EXPECT_EQ(checkpoint->find(module + ".weight")->dtype, "I8");
  EXPECT_EQ(checkpoint->find(module + ".weight_scale")->dtype, "F32");
  EXPECT_EQ(checkpoint->find("model.layers.0.mlp.gate.weight")->dtype, "BF16");
  EXPECT_EQ(checkpoint->find("model.norm.weight")->dtype, "BF16");
}

TEST_F(QuantizeFilesTest, NeverOverwritesUnasked) {
  ASSERT_EQ(error(), "no error");
  EXPECT_THAT(error(), testing::HasSubstr("/target: exists; give another folder, or --force"));
  options_.may_replace = true;
  options_.quantization.name = "wint4";
  ASSERT_EQ(error(), "no error");
  EXPECT_THAT(read_text(options_.target + "/config.json"), testing::HasSubstr("pack-quantized"));
  fs::remove(options_.target + "/config.json");
  EXPECT_THAT(error(), testing::HasSubstr("holds no config.json, so --force does not replace it"));
  options_.target = options_.source;
  EXPECT_THAT(error(), testing::HasSubstr("is the source itself"));
  EXPECT_EQ(std::distance(fs::directory_iterator(dir_.path()), fs::directory_iterator()), 2);  // no remains
}

TEST_F(QuantizeFilesTest, LeavesNothingBehindAFault) {
  std::vector<FileTensor> tensors = read_tensors(options_.source + "/model.safetensors");
  find_tensor(tensors, "model.layers.1.mlp.experts.2.down_proj.weight").data.replace(6, 2, "\x80\x7F");  // infinity
  std::ofstream(options_.source + "/model.safetensors", std::ios::binary) << safetensors_image(tensors);
  EXPECT_THAT(error(), testing::HasSubstr("\"model.layers.1.mlp.experts.2.down_proj.weight\" holds a value that is not "
                                          "finite"));
  EXPECT_EQ(std::distance(fs::directory_iterator(dir_.path()), fs::directory_iterator()), 1);
  LoadOptions options = golden_options(options_.source, ComputeType::kBf16);
  options.quantization.name = "w8a8";
  EXPECT_THAT(load_model(*ops_, options).error().message, testing::HasSubstr("not finite"));
  options_.quantization.name = "auto";
  EXPECT_THAT(error(), testing::HasSubstr("--quantization is auto, must be wint8, wint4, w8a8 or w4a8"));
}

TEST_F(QuantizeFilesTest, DoesNotQuantiseTwice) {
  ASSERT_EQ(error(), "no error");
  options_.source = options_.target;
  options_.target = dir_.path() + "/again";
  options_.quantization.name = "wint4";
  EXPECT_THAT(error(), testing::HasSubstr("--quantization asks for int4 a16, but tensor"));
  options_.target = "";
  EXPECT_EQ(error(), "the folder to write has an empty name; give another");
  options_.target = dir_.path() + "/again";
  options_.quantization = {"w8a8", 0, "int4"};
  EXPECT_THAT(error(), testing::HasSubstr("--lm-head-quantization asks for int4 g128 a8, but tensor \"lm_head.weight\" "
                                          "is int8 a8 in the checkpoint"));
}

// Only the activations of a checkpoint of integers can be chosen, and that of all layers.
TEST_F(QuantizeFilesTest, ActivationsOfAStoredHeadMayBeChosen) {
  options_.quantization = {"wint4", 32, "int4"};
  ASSERT_EQ(error(), "no error");
  LoadOptions options = golden_options(options_.target, ComputeType::kBf16);
  options.quantization = {"w4a8", 32};
  const std::unique_ptr<Model> stored = must_load(*ops_, options);
  options = golden_options(options_.source, ComputeType::kBf16);
  options.quantization = {"w4a8", 32, "int4"};
  const std::unique_ptr<Model> made = must_load(*ops_, options);
  Sequences from_stored(*ops_, *stored, {kTokens});
  Sequences from_made(*ops_, *made, {kTokens});
  from_stored.run(0, 8, 8);
  from_made.run(0, 8, 8);
  EXPECT_EQ(from_stored.logits(0), from_made.logits(0));
}

// Stacked experts come out one by one.
TEST_F(QuantizeFilesTest, UnstacksExperts) {
  std::vector<FileTensor> tensors = read_tensors(options_.source + "/model.safetensors");
  std::vector<FileTensor> rest;
  std::map<std::string, FileTensor> stacks;
  std::map<std::string, std::map<int64_t, std::map<std::string, FileTensor>>> experts;
  for (const FileTensor& tensor : tensors) {
    const size_t at = tensor.name.find(".mlp.experts.");
    if (at == std::string::npos) {
      rest.push_back(tensor);
      continue;
    }
    const std::string prefix = tensor.name.substr(0, at + 13);
    const std::string tail = tensor.name.substr(at + 13);
    const size_t dot = tail.find('.');
    experts[prefix][std::stoll(tail.substr(0, dot))][tail.substr(dot + 1)] = tensor;
  }
  for (const auto& [prefix, by_expert] : experts) {
    FileTensor gate_up{prefix + "gate_up_proj", "BF16", {}, ""};
    FileTensor down{prefix + "down_proj", "BF16", {}, ""};
    for (const auto& [expert, parts] : by_expert) {
      const FileTensor& gate = parts.at("gate_proj.weight");
      const FileTensor& one_down = parts.at("down_proj.weight");
      gate_up.shape = {expert + 1, 2 * gate.shape[0], gate.shape[1]};
      gate_up.data += gate.data + parts.at("up_proj.weight").data;
      down.shape = {expert + 1, one_down.shape[0], one_down.shape[1]};
      down.data += one_down.data;
    }
    rest.push_back(gate_up);
    rest.push_back(down);
  }
  options_.quantization = {"w4a8", 32};
  ASSERT_EQ(error(), "no error");
  const std::vector<FileTensor> separate = read_tensors(options_.target + "/model.safetensors");
  std::ofstream(options_.source + "/model.safetensors", std::ios::binary) << safetensors_image(rest);
  options_.target += "-stacked";
  ASSERT_EQ(error(), "no error");
  std::vector<FileTensor> stacked = read_tensors(options_.target + "/model.safetensors");
  ASSERT_EQ(stacked.size(), separate.size());
  for (const FileTensor& tensor : separate)
    EXPECT_EQ(find_tensor(stacked, tensor.name).data, tensor.data) << tensor.name;
}

}  // namespace
}  // namespace tandem::model
