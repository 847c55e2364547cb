// What load_model makes of good and bad model folders.
#include <limits>
#include <nlohmann/json.hpp>

#include "src/model/memory_needs.h"
#include "src/model/quantize_checkpoint.h"
#include "src/model/test_support.h"

namespace tandem::model {
namespace {

// A copy of a golden case whose config and tensors a test may change.
struct Folder {
  TempDir dir;
  std::string config;
  std::vector<FileTensor> tensors;

  explicit Folder(const std::string& golden)
      : config(read_text(golden_path(golden) + "/config.json")),
        tensors(read_tensors(golden_path(golden) + "/model.safetensors")) {}

  void write() const {
    dir.write("config.json", config);
    dir.write("model.safetensors", safetensors_image(tensors));
  }
  FileTensor& tensor(const std::string& name) { return find_tensor(tensors, name); }
  void erase(const std::string& name) {
    std::erase_if(tensors, [&](const FileTensor& tensor) { return tensor.name == name; });
  }
};

class LoadTest : public testing::Test {
 protected:
  std::string error_of(const Folder& folder) {
    folder.write();
    const Result<std::unique_ptr<Model>> model =
        load_model(*ops_, golden_options(folder.dir.path(), ComputeType::kBf16));
    return model.ok() ? "loaded" : model.error().message;
  }
  Sequences::Logits logits_of(const LoadOptions& options) {
    const std::unique_ptr<Model> model = must_load(*ops_, options);
    Sequences sequences(*ops_, *model, {{3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8}});
    sequences.run(0, 8, 8);
    return sequences.logits(0);
  }
  Sequences::Logits logits_of(const std::string& path) { return logits_of(golden_options(path, ComputeType::kF32)); }

  const std::unique_ptr<kernels::Ops> ops_ = must_make_ops("ref");
};

LoadOptions dummy_options(const std::string& path, uint64_t seed) {
  LoadOptions options = golden_options(path, ComputeType::kBf16);
  options.format = LoadFormat::kDummy;
  options.dummy_seed = seed;
  return options;
}

// What is foretold before loading is what is then taken, within a tenth: scales are small, panels are filled up.
TEST_F(LoadTest, ForetellsItsMemory) {
  const std::unique_ptr<kernels::Ops> ops = must_make_ops("auto");
  for (const char* quantization : {"auto", "wint8", "w8a8", "wint4", "w4a8"}) {
    SCOPED_TRACE(quantization);
    LoadOptions options;
    options.path = std::string(TANDEM_SOURCE_DIR) + "/models/demo";
    options.quantization.name = quantization;
    options.max_num_batched_tokens = 64;
    options.max_num_seqs = 4;
    MemoryNeeds needs;
    options.on_sized = [&needs](const MemoryNeeds& foretold) {
      needs = foretold;
      return Status();
    };
    const std::unique_ptr<Model> model = must_load(*ops, options);
    const double actual = static_cast<double>(model->info().weight_bytes);
    EXPECT_NEAR(static_cast<double>(needs.weight_bytes), actual, 0.1 * actual);
    const double experts = static_cast<double>(model->info().expert_bytes);
    EXPECT_NEAR(static_cast<double>(needs.expert_bytes), experts, 0.1 * experts);
    EXPECT_EQ(needs.kv, model->info().kv);
    EXPECT_GT(needs.workspace_bytes, 0);
  }
}

// What the lines at start say of the weights.
TEST_F(LoadTest, TellsFormatsAndWhatIsNotUsed) {
  const std::unique_ptr<kernels::Ops> ops = must_make_ops("auto");
  Folder folder("qwen_base");
  folder.write();
  const auto told = [&](const QuantizationRequest& request, const std::string& path) {
    LoadOptions options = golden_options(path, ComputeType::kBf16);
    options.quantization = request;
    testing::internal::CaptureStderr();
    const Result<std::unique_ptr<Model>> model = load_model(*ops, options);
    const std::string text = testing::internal::GetCapturedStderr();
    EXPECT_TRUE(model.ok()) << model.error().message;
    return text;
  };
  const auto has = [](const std::string& text) { return testing::HasSubstr(text); };
  EXPECT_THAT(told({"auto", 0}, folder.dir.path()),
              testing::AllOf(testing::Not(has("scales")), testing::Not(has("kv_cache_scheme"))));
  EXPECT_THAT(told({"w8a8", 0}, folder.dir.path()),
              testing::AllOf(has("lm_head int8 a8"), has(" MiB, scales f32, KV")));
  EXPECT_THAT(told({"w4a8", 32, "int4"}, folder.dir.path()),
              testing::AllOf(has("lm_head int4 g32 a8"), has(" MiB, scales f16, KV"),
                             testing::Not(has("the head has 8 bits"))));
  EXPECT_THAT(told({"w4a8", 32}, folder.dir.path()),
              testing::AllOf(has("lm_head int8 a8; the head has 8 bits unless"), has("scales f16 (1 of")));
  EXPECT_THAT(told({"auto", 0, "int8"}, folder.dir.path()), has("lm_head int8 a16"));

  QuantizeOptions quantize;
  quantize.source = folder.dir.path();
  quantize.target = folder.dir.path() + "/quantised";
  quantize.quantization.name = "w8a8";
  ASSERT_TRUE(quantize_checkpoint(*ops, quantize).ok());
  EXPECT_THAT(told({"auto", 0}, quantize.target), testing::Not(has("kv_cache_scheme")));
  const std::string config = read_text(quantize.target + "/config.json");
  std::ofstream(quantize.target + "/config.json")
      << replaced(config, R"("kv_cache_scheme": null)", R"("kv_cache_scheme": {"num_bits": 8, "type": "float"})");
  EXPECT_THAT(told({"auto", 0}, quantize.target),
              has("the checkpoint's scales of keys and values (kv_cache_scheme) are not used"));
}

TEST_F(LoadTest, ATiedHeadTakesNoFormat) {
  LoadOptions options = golden_options(golden_path("qwen_tied"), ComputeType::kBf16);
  options.quantization = {"w4a8", 0, "int4"};
  EXPECT_EQ(load_model(*ops_, options).error().message,
            "--lm-head-quantization is int4, but the model's head is its embedding (tie_word_embeddings), which is not "
            "quantised; leave it out");
}

TEST_F(LoadTest, EndsBeforeReadingIfItIsTooLarge) {
  LoadOptions options = golden_options(golden_path("qwen_base"), ComputeType::kBf16);
  bool has_read = false;
  options.on_sized = [](const MemoryNeeds&) -> Status { return make_error(ErrorKind::kUnavailable, "too large"); };
  options.on_progress = [&has_read](double fraction) { has_read = has_read || fraction > 0; };
  const Result<std::unique_ptr<Model>> model = load_model(*ops_, options);
  ASSERT_FALSE(model.ok());
  EXPECT_EQ(model.error().message, "too large");
  EXPECT_FALSE(has_read);
}

TEST_F(LoadTest, DescribesTheModel) {
  const std::unique_ptr<Model> deepseek = must_load(*ops_, golden_options(golden_path("ds_base"), ComputeType::kBf16));
  EXPECT_EQ(deepseek->info().architecture, "DeepseekV3ForCausalLM");
  EXPECT_EQ(deepseek->info().kv.describe(), "mla 3 layers x 8 tokens x 80 B bf16");
  EXPECT_TRUE(deepseek->info().rows_depend_on_role);
  LoadOptions in_fp8 = golden_options(golden_path("ds_base"), ComputeType::kBf16);
  in_fp8.kv_cache = KvCacheType::kF8E4M3;
  EXPECT_EQ(must_load(*ops_, in_fp8)->info().kv.describe(), "mla 3 layers x 8 tokens x 52 B f8_e4m3 with scales");
  const std::unique_ptr<Model> qwen = must_load(*ops_, golden_options(golden_path("qwen_base"), ComputeType::kF32));
  EXPECT_EQ(qwen->info().kv.describe(), "gqa 3 layers x 8 tokens x 256 B f32");
  EXPECT_EQ(qwen->info().max_model_len, 512);
  EXPECT_FALSE(qwen->info().rows_depend_on_role);
  EXPECT_EQ(qwen->info().fingerprint.size(), 64U);
}

TEST_F(LoadTest, RefusesFp8BehindAnOddLatent) {
  Folder folder("ds_base");
  const size_t at = folder.config.find("\"kv_lora_rank\": 32");
  ASSERT_NE(at, std::string::npos);
  folder.config.replace(at, 18, "\"kv_lora_rank\": 31");
  folder.write();
  LoadOptions options = dummy_options(folder.dir.path(), 1);
  must_load(*ops_, options);
  options.kv_cache = KvCacheType::kF8E4M3;
  const Result<std::unique_ptr<Model>> model = load_model(*ops_, options);
  ASSERT_FALSE(model.ok());
  EXPECT_TRUE(model.error().message.find("--kv-cache-dtype fp8 needs an even kv_lora_rank") != std::string::npos &&
              model.error().message.ends_with("has 31; use auto"))
      << model.error().message;
}

TEST_F(LoadTest, CountsEachParameterOnce) {
  Folder folder("ds_group1_mtp");
  int64_t parameters = 0;
  for (const FileTensor& tensor : folder.tensors) {
    if (tensor.name.starts_with("model.layers.2.")) continue;  // MTP
    parameters += std::accumulate(tensor.shape.begin(), tensor.shape.end(), int64_t{1}, std::multiplies<>());
  }
  const LoadOptions options = golden_options(golden_path("ds_group1_mtp"), ComputeType::kBf16);
  EXPECT_EQ(must_load(*ops_, options)->info().num_parameters, parameters);
}

TEST_F(LoadTest, ReportsProgressUpToOne) {
  std::vector<double> fractions;
  LoadOptions options = golden_options(golden_path("qwen_base"), ComputeType::kBf16);
  options.on_progress = [&](double fraction) { fractions.push_back(fraction); };
  must_load(*ops_, options);
  EXPECT_GT(fractions.size(), 10U);
  EXPECT_TRUE(std::is_sorted(fractions.begin(), fractions.end()));
  EXPECT_EQ(fractions.back(), 1.0);
}

TEST_F(LoadTest, StackedExpertsAreTheSameModel) {
  for (const char* name : {"qwen_base", "ds_base", "qwen_fp8"}) {
    Folder folder(name);
    const bool is_fp8 = std::string_view(name) == "qwen_fp8";
    const std::string suffixes[] = {"", "_scale_inv"};
    if (is_fp8) {  // one scale row serves gate and up in the stacked form, so make them equal
      for (FileTensor& tensor : folder.tensors) {
        const size_t at = tensor.name.find("up_proj.weight_scale_inv");
        if (at != std::string::npos) {
          tensor.data = folder.tensor(tensor.name.substr(0, at) + "gate_proj.weight_scale_inv").data;
        }
      }
    }
    folder.write();
    const Sequences::Logits separate = logits_of(folder.dir.path());
    for (int layer = 0; layer < 3; ++layer) {
      for (const std::string& suffix : suffixes) {
        const std::string prefix = fmt::format("model.layers.{}.mlp.experts.", layer);
        FileTensor gate_up{prefix + "gate_up_proj" + suffix, "", {0}, ""};
        FileTensor down{prefix + "down_proj" + suffix, "", {0}, ""};
        std::vector<FileTensor> rest;
        for (const FileTensor& tensor : folder.tensors) {
          const bool is_ours = tensor.name.starts_with(prefix) && tensor.name.ends_with("weight" + suffix);
          if (!is_ours) {
            rest.push_back(tensor);
          }
        }
        for (int64_t e = 0;; ++e) {
          const std::string expert = prefix + std::to_string(e);
          if (std::none_of(folder.tensors.begin(), folder.tensors.end(), [&](const FileTensor& tensor) {
                return tensor.name == expert + ".gate_proj.weight" + suffix;
              })) {
            break;
          }
          const FileTensor& gate = folder.tensor(expert + ".gate_proj.weight" + suffix);
          const FileTensor& up = folder.tensor(expert + ".up_proj.weight" + suffix);
          const FileTensor& one_down = folder.tensor(expert + ".down_proj.weight" + suffix);
          const bool is_scale = !suffix.empty();
          gate_up.dtype = gate.dtype;
          gate_up.shape = {e + 1, is_scale ? 1 : 2 * gate.shape[0], gate.shape[1]};
          gate_up.data += is_scale ? gate.data : gate.data + up.data;
          down.dtype = one_down.dtype;
          down.shape = {e + 1, one_down.shape[0], one_down.shape[1]};
          down.data += one_down.data;
        }
        if (gate_up.data.empty()) continue;
        rest.push_back(gate_up);
        rest.push_back(down);
        folder.tensors = rest;
      }
    }
    folder.write();
    EXPECT_EQ(logits_of(folder.dir.path()), separate) << name;
  }
}

// Experts of 1,560 columns: thirteen FP8 blocks or groups of 128, of which the last has 24.
TEST_F(LoadTest, ExpertWidthNeedNotBeAMultipleOfTheBlock) {
  constexpr int64_t kWidth = 1560;
  constexpr int64_t kHidden = 64;
  std::mt19937_64 random(1560);
  std::vector<FileTensor> scales_of_all;
  Folder as_fp8("qwen_base");
  Folder as_f32("qwen_base");
  as_fp8.config = replaced(as_fp8.config, "\"moe_intermediate_size\": 24", "\"moe_intermediate_size\": 1560");
  as_f32.config = as_fp8.config;
  as_fp8.config = replaced(as_fp8.config, "{", R"({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3",
      "activation_scheme": "dynamic", "weight_block_size": [128, 128]},)");
  for (FileTensor& tensor : as_fp8.tensors) {
    if (tensor.name.find(".experts.") == std::string::npos) continue;
    const bool is_down = tensor.name.find("down_proj") != std::string::npos;
    const int64_t n = is_down ? kHidden : kWidth;
    const int64_t k = is_down ? kWidth : kHidden;
    const int64_t columns = (k + 127) / 128;
    std::vector<float> scales(static_cast<size_t>((n + 127) / 128 * columns));
    for (float& scale : scales) scale = 1e-3F * static_cast<float>(1 + random() % 8);
    std::vector<uint8_t> codes(static_cast<size_t>(n * k));
    std::vector<float> values(codes.size());
    for (size_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<uint8_t>(random() % 2 * 128 + random() % 96);
      const int64_t row = static_cast<int64_t>(i) / k;
      const int64_t column = static_cast<int64_t>(i) % k;
      values[i] =
          kernels::float_from_f8e4m3(codes[i]) * scales[static_cast<size_t>(row / 128 * columns + column / 128)];
    }
    const auto text_of = [](const auto& array) {
      return std::string(reinterpret_cast<const char*>(array.data()), array.size() * sizeof(array[0]));
    };
    as_f32.tensor(tensor.name) = {tensor.name, "F32", {n, k}, text_of(values)};
    tensor = {tensor.name, "F8_E4M3", {n, k}, text_of(codes)};
    scales_of_all.push_back({tensor.name + "_scale_inv", "F32", {(n + 127) / 128, columns}, text_of(scales)});
  }
  as_fp8.tensors.insert(as_fp8.tensors.end(), scales_of_all.begin(), scales_of_all.end());
  as_fp8.write();
  as_f32.write();
  for (const QuantizationRequest& request :
       {QuantizationRequest{}, {"w8a8", 0}, {"wint4", 128}, {"w4a8", 0}, {"wint8", 0}}) {
    SCOPED_TRACE(request.name);
    LoadOptions of_fp8 = golden_options(as_fp8.dir.path(), ComputeType::kF32);
    LoadOptions of_f32 = golden_options(as_f32.dir.path(), ComputeType::kF32);
    of_fp8.quantization = request;
    of_f32.quantization = request;
    const Sequences::Logits logits = logits_of(of_fp8);
    EXPECT_EQ(logits, logits_of(of_f32));
    for (const float value : logits.back()) ASSERT_TRUE(std::isfinite(value));
  }
}

TEST_F(LoadTest, FingerprintTellsWeightsAndConfigsApart) {
  const auto fingerprint_of = [&](const std::string& path) {
    return must_load(*ops_, golden_options(path, ComputeType::kBf16))->info().fingerprint;
  };
  Folder folder("qwen_base");
  folder.write();
  const std::string original = fingerprint_of(golden_path("qwen_base"));
  EXPECT_EQ(fingerprint_of(folder.dir.path()), original);
  std::reverse(folder.tensors.begin(), folder.tensors.end());
  folder.write();
  EXPECT_EQ(fingerprint_of(folder.dir.path()), original);  // where a tensor lies in the file does not matter
  for (char& c : folder.tensor("model.layers.2.self_attn.o_proj.weight").data) c = static_cast<char>(c ^ 1);
  folder.write();
  EXPECT_NE(fingerprint_of(folder.dir.path()), original);
  Folder other_theta("qwen_base");
  other_theta.config = replaced(other_theta.config, "\"rope_theta\": 1000000.0", "\"rope_theta\": 5000000.0");
  other_theta.write();
  EXPECT_NE(fingerprint_of(other_theta.dir.path()), original);
}

TEST_F(LoadTest, DummyWeightsDependOnTheSeedAlone) {
  const std::string config = golden_path("ds_base") + "/config.json";
  const Sequences::Logits one = logits_of(dummy_options(config, 7));
  EXPECT_EQ(logits_of(dummy_options(golden_path("ds_base"), 7)), one);
  EXPECT_NE(logits_of(dummy_options(config, 8)), one);
  const std::unique_ptr<Model> a = must_load(*ops_, dummy_options(config, 7));
  const std::unique_ptr<Model> b = must_load(*ops_, dummy_options(config, 8));
  EXPECT_NE(a->info().fingerprint, b->info().fingerprint);
  EXPECT_EQ(a->info().fingerprint, must_load(*ops_, dummy_options(config, 7))->info().fingerprint);
  for (const std::vector<float>& row : one) {
    for (const float value : row) ASSERT_TRUE(std::isfinite(value));
  }
}

// A sum of more products than an int32 holds would be wrong without a word.
TEST_F(LoadTest, RefusesGroupsTooWideToSum) {
  nlohmann::json config = nlohmann::json::parse(read_text(golden_path("ds_base") + "/config.json"));
  config["intermediate_size"] = 65'552;
  TempDir dir;
  dir.write("config.json", config.dump());
  LoadOptions options = dummy_options(dir.path() + "/config.json", 1);
  options.quantization.name = "w8a8";
  const Result<std::unique_ptr<Model>> model = load_model(*ops_, options);
  ASSERT_FALSE(model.ok());
  EXPECT_EQ(
      model.error().message,
      "model.layers.0.mlp.down_proj.weight: 65552 columns share a scale, at most 65536 can be summed exactly; use "
      "--quantization wint4 or w4a8 with a --quantization-group-size, or auto");
}

TEST_F(LoadTest, DummyWeightsAreTheSameForAnyThreadCount) {
  for (const std::string& backend : kernels::available_backends()) {
    Sequences::Logits first;
    for (const int threads : {1, 2, 3}) {
      const std::unique_ptr<kernels::Ops> ops = must_make_ops(backend, threads);
      const std::unique_ptr<Model> model = must_load(*ops, dummy_options(golden_path("qwen_base"), 1));
      Sequences sequences(*ops, *model, {{1, 2, 3}});
      sequences.run(0, 3, 3);
      if (threads == 1) first = sequences.logits(0);
      EXPECT_EQ(sequences.logits(0), first) << backend;
    }
  }
}

// A context so long that the expanded keys and values of MLA are computed one head at a time must not change a bit.
TEST_F(LoadTest, HeadGroupsOfExpandedAttentionDoNotShow) {
  Folder folder("ds_base");
  folder.write();
  LoadOptions options = golden_options(folder.dir.path(), ComputeType::kBf16);
  options.max_model_len = 64;
  const Sequences::Logits together = logits_of(options);
  folder.config = replaced(folder.config, "\"max_position_embeddings\": 512", "\"max_position_embeddings\": 67108864");
  folder.write();
  EXPECT_EQ(logits_of(options), together);
}

TEST_F(LoadTest, RefusesFoldersWhoseConfigAndTensorsDisagree) {
  const std::string layer = "model.layers.1.";
  const struct {
    const char* golden;
    std::function<void(Folder&)> change;
    std::string message;
  } cases[] = {
      {"qwen_base", [](Folder& f) { f.config = replaced(f.config, "\"vocab_size\": 1", "\"vocab_size\": 2"); },
       "tensor \"model.embed_tokens.weight\" has shape ["},
      {"qwen_base", [&](Folder& f) { f.erase(layer + "self_attn.q_norm.weight"); },
       "has no tensor \"model.layers.1.self_attn.q_norm.weight\" of shape [16]"},
      {"qwen_base", [&](Folder& f) { f.erase("lm_head.weight"); }, "has no tensor \"lm_head.weight\""},
      {"qwen_base", [&](Folder& f) { f.erase(layer + "mlp.experts.7.up_proj.weight"); },
       "has no tensor \"model.layers.1.mlp.experts.7.up_proj.weight\""},
      {"qwen_base",
       [&](Folder& f) { f.config = replaced(f.config, "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2"); },
       "config.json: num_hidden_layers is 2, but"},
      {"qwen_base",
       [&](Folder& f) { f.config = replaced(f.config, "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4"); },
       "has no tensor \"model.layers.3.input_layernorm.weight\""},
      {"qwen_base", [&](Folder& f) { f.tensor(layer + "self_attn.q_proj.weight").dtype = "I16"; },
       "tensor \"model.layers.1.self_attn.q_proj.weight\" has dtype I16, must be BF16, F16 or F32"},
      {"qwen_base", [&](Folder& f) { f.tensor("model.norm.weight").dtype = "U16"; },
       "tensor \"model.norm.weight\" has dtype U16"},
      {"ds_base", [&](Folder& f) { f.erase(layer + "mlp.gate.e_score_correction_bias"); },
       "has no tensor \"model.layers.1.mlp.gate.e_score_correction_bias\" of shape [8]"},
      {"ds_base",
       [&](Folder& f) {
         std::swap(f.tensor(layer + "self_attn.kv_b_proj.weight").shape[0],
                   f.tensor(layer + "self_attn.kv_b_proj.weight").shape[1]);
       },
       "has shape [32, 128], but config.json asks for [128, 32]"},
      {"ds_fp8", [&](Folder& f) { f.erase(layer + "self_attn.o_proj.weight_scale_inv"); },
       "has no tensor \"model.layers.1.self_attn.o_proj.weight_scale_inv\" of shape [2, 1]"},
      {"ds_fp8",
       [&](Folder& f) {
         f.tensor(layer + "self_attn.o_proj.weight_scale_inv").shape = {1, 2};
       },
       "\"model.layers.1.self_attn.o_proj.weight_scale_inv\" has shape [1, 2], but config.json asks for [2, 1]"},
      {"ds_fp8", [&](Folder& f) { f.tensor(layer + "self_attn.o_proj.weight_scale_inv").dtype = "I32"; },
       "weight_scale_inv\" has dtype I32"},
      {"ds_fp8",
       [&](Folder& f) {
         const float bad = std::numeric_limits<float>::quiet_NaN();
         std::memcpy(f.tensor(layer + "self_attn.o_proj.weight_scale_inv").data.data() + 4, &bad, 4);
       },
       "weight_scale_inv\" holds nan at [1, 0], must be finite"},
      {"ds_fp8",
       [&](Folder& f) {
         const float bad = -0.5F;
         std::memcpy(f.tensor(layer + "self_attn.o_proj.weight_scale_inv").data.data() + 4, &bad, 4);
       },
       "weight_scale_inv\" holds -0.5 at [1, 0], must be positive"},
      {"ds_fp8",
       [&](Folder& f) {
         const float bad = 0;
         std::memcpy(f.tensor(layer + "self_attn.o_proj.weight_scale_inv").data.data() + 4, &bad, 4);
       },
       "weight_scale_inv\" holds 0 at [1, 0], must be positive"},
      {"ds_fp8",
       [&](Folder& f) {
         const float bad = std::numeric_limits<float>::infinity();
         std::memcpy(f.tensor(layer + "self_attn.kv_b_proj.weight_scale_inv").data.data(), &bad, 4);
       },
       "weight_scale_inv\" holds inf at [0, 0], must be finite"},
      {"qwen_fp8",
       [&](Folder& f) {
         f.tensor(layer + "mlp.experts.1.down_proj.weight_scale_inv").data = std::string("\x80\x7f\0\0", 4);
       },
       "experts.1.down_proj.weight_scale_inv\" holds inf"},
      {"ds_fp8", [&](Folder& f) { f.config = replaced(f.config, "\"quantization_config\"", "\"unused\""); },
       "is F8_E4M3, but config.json has no quantization_config"},
      {"ds_fp8",
       [&](Folder& f) { f.config = replaced(f.config, "\"lm_head\",", "\"lm_head\", \"model.layers.1.self_attn\","); },
       "is F8_E4M3, but modules_to_not_convert excludes it"},
      {"qwen_fp8",
       [&](Folder& f) {
         f.tensors.push_back({layer + "self_attn.o_proj.weight_scale_inv", "BF16", {2, 2}, std::string(8, '\0')});
       },
       "has scales in \"model.layers.1.self_attn.o_proj.weight_scale_inv\" but dtype BF16, must be F8_E4M3"},
  };
  for (const auto& bad : cases) {
    Folder folder(bad.golden);
    bad.change(folder);
    const std::string error = error_of(folder);
    EXPECT_THAT(error, testing::HasSubstr(bad.message));
    EXPECT_THAT(error, testing::StartsWith(folder.dir.path()));
    EXPECT_EQ(error.find('\n'), std::string::npos);
  }
}

TEST_F(LoadTest, RefusesOptionsOutOfRange) {
  const auto error_with = [&](const std::function<void(LoadOptions&)>& change) {
    LoadOptions options = golden_options(golden_path("qwen_base"), ComputeType::kBf16);
    change(options);
    return load_model(*ops_, options).error().message;
  };
  EXPECT_EQ(error_with([](LoadOptions& o) { o.max_model_len = 513; }), "--max-model-len is 513, must be from 0 to 512");
  EXPECT_THAT(error_with([](LoadOptions& o) { o.max_num_batched_tokens = 0; }), testing::HasSubstr("must be from 1"));
  EXPECT_THAT(error_with([](LoadOptions& o) { o.max_num_seqs = 0; }), testing::HasSubstr("must be from 1"));
  EXPECT_THAT(error_with([](LoadOptions& o) { o.block_size = 0; }), testing::HasSubstr("must be from 1"));
}

}  // namespace
}  // namespace tandem::model
