// Every layout of integer weights, against matrices written element by element.
#include "src/kernels/integer.h"
#include "src/model/checkpoint.h"
#include "src/model/config.h"
#include "src/model/layout_test_support.h"
#include "src/model/sources.h"

namespace tandem::model {
namespace {

constexpr const char* kModule = "model.layers.0.self_attn.q_proj";

struct LayoutCase {
  std::string name;
  std::string quantization;  // quantization_config; empty: ModelSlim's own file
  int64_t bits;
  int64_t n;
  int64_t k;
  int64_t group;
  bool is_symmetric;
  std::function<std::vector<FileTensor>(const TestIntegers&)> write;
};

constexpr const char* kAwqConfig =
    R"({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": true, "version": "gemm"})";

std::string gptq_config(int64_t bits, int64_t group, bool is_symmetric, const char* format) {
  return fmt::format(
      R"({{"quant_method": "gptq", "bits": {}, "group_size": {}, "desc_act": false, "sym": {}, "checkpoint_format": "{}"}})",
      bits, group == 0 ? -1 : group, is_symmetric, format);
}

std::vector<LayoutCase> layout_cases() {
  std::vector<LayoutCase> cases;
  for (const bool is_symmetric : {true, false}) {
    const std::string suffix = is_symmetric ? "_symmetric" : "_zeros";
    for (const int64_t bits : {4, 8}) {
      for (const int64_t group : {0, 32}) {
        // Odd n for zeros packed along n; odd k where a row may be one group.
        cases.push_back({fmt::format("packed{}_g{}{}", bits, group, suffix),
                         compressed_config("pack-quantized", bits, group, is_symmetric, false), bits, 21,
                         group == 0 ? 75 : 96, group, is_symmetric,
                         [=](const TestIntegers& m) { return as_packed(kModule, m, is_symmetric); }});
        for (const bool is_v2 : {false, true}) {
          cases.push_back({fmt::format("gptq{}_{}_g{}{}", is_v2 ? "_v2" : "", bits, group, suffix),
                           gptq_config(bits, group, is_symmetric, is_v2 ? "gptq_v2" : "gptq"), bits, 24, 96, group,
                           is_symmetric, [=](const TestIntegers& m) { return as_gptq(kModule, m, is_v2); }});
        }
      }
    }
    cases.push_back({"bytes" + suffix, compressed_config("int-quantized", 8, 0, is_symmetric, true), 8, 21, 75, 0,
                     is_symmetric, [=](const TestIntegers& m) { return as_bytes(kModule, m, is_symmetric, false); }});
  }
  cases.push_back({"awq", kAwqConfig, 4, 24, 96, 32, false, [](const TestIntegers& m) { return as_awq(kModule, m); }});
  cases.push_back(
      {"ascend", "", 8, 21, 75, 0, true, [](const TestIntegers& m) { return as_bytes(kModule, m, true, true); }});
  return cases;
}

std::string layout_name(const testing::TestParamInfo<LayoutCase>& test) { return test.param.name; }

// A folder that holds one matrix and the config of a small model.
struct OneMatrix {
  TempDir dir;
  std::vector<FileTensor> tensors;
  std::string quantization;

  Result<std::unique_ptr<WeightSource>> open() const {
    dir.write("config.json", config_with("qwen_base", quantization));
    if (quantization.empty()) {
      dir.write("quant_model_description.json",
                fmt::format(R"({{"group_size": 0, "{0}.weight": "W8A8_DYNAMIC", "{0}.weight_scale": "W8A8_DYNAMIC"}})",
                            kModule));
    }
    dir.write("model.safetensors", safetensors_image(tensors));
    TANDEM_ASSIGN(const ModelConfig config, load_config(dir.path()));
    TANDEM_ASSIGN(std::unique_ptr<Checkpoint> checkpoint, Checkpoint::open(dir.path()));
    return make_checkpoint_source(std::move(checkpoint), config.quant);
  }
};

class LayoutTest : public testing::TestWithParam<LayoutCase> {
 protected:
  LayoutTest() {
    std::mt19937_64 random(kSeed);
    matrix_ =
        random_integers(random, GetParam().bits, GetParam().n, GetParam().k, GetParam().group, GetParam().is_symmetric);
    folder_.tensors = GetParam().write(matrix_);
    folder_.quantization = GetParam().quantization;
    source_ = folder_.open().value();
    EXPECT_TRUE(source_->check_matrix(ref()).ok());
    EXPECT_TRUE(source_->check_values(ref()).ok());
  }
  MatrixRef ref() const { return {std::string(kModule) + ".weight", GetParam().n, GetParam().k}; }

  static constexpr uint64_t kSeed = 4242;
  TestIntegers matrix_;
  OneMatrix folder_;
  std::unique_ptr<WeightSource> source_;
};

TEST_P(LayoutTest, DecodesToTheSameFloats) {
  for (const int64_t first : {0, 8, 16}) {
    const int64_t count = std::min<int64_t>(8, matrix_.n - first);
    std::vector<float> values(static_cast<size_t>(count * matrix_.k));
    source_->read_rows(ref(), first, count, kernels::DType::kF32, reinterpret_cast<std::byte*>(values.data()));
    for (int64_t i = 0; i < count * matrix_.k; ++i) {
      ASSERT_EQ(values[static_cast<size_t>(i)], matrix_.value(first + i / matrix_.k, i % matrix_.k))
          << "row " << first + i / matrix_.k << " column " << i % matrix_.k << ", seed " << kSeed;
    }
  }
}

TEST_P(LayoutTest, KeepsCodesScalesAndZeros) {
  const std::optional<kernels::WeightFormat> format = source_->integer_format(ref());
  if (matrix_.bits == 8 && !GetParam().is_symmetric) {
    EXPECT_FALSE(format.has_value());  // no kernel takes 8 bits with zeros: they are decoded
    return;
  }
  const int64_t activation_bits = GetParam().name.starts_with("bytes") || GetParam().name == "ascend" ? 8 : 16;
  const kernels::WeightType type = matrix_.bits == 8 ? kernels::WeightType::kInt8 : kernels::WeightType::kInt4;
  ASSERT_EQ(format, (kernels::WeightFormat{type, GetParam().group, activation_bits}));
  IntegerBuffer buffer;
  buffer.resize(matrix_.n, matrix_.k, *format, source_->has_zeros(ref()));
  source_->read_integers(ref(), 0, matrix_.n, buffer.rows());
  for (int64_t row = 0; row < matrix_.n; ++row) {
    const IntegerRows rows = buffer.rows().from(row);
    for (int64_t k = 0; k < matrix_.k; ++k) {
      const uint32_t code = matrix_.bits == 8 ? std::to_integer<uint32_t>(rows.codes[k] ^ std::byte{0x80})
                                              : (std::to_integer<uint32_t>(rows.codes[k / 2]) >> (k % 2 * 4)) & 0x0FU;
      ASSERT_EQ(code, matrix_.code(row, k));
    }
    for (int64_t g = 0; g < matrix_.groups(); ++g) {
      ASSERT_EQ(rows.scales[g], kernels::float_from_f16(matrix_.scale(row, g)));
      const uint32_t zero =
          rows.zeros == nullptr ? (matrix_.bits == 8 ? 128 : 8) : std::to_integer<uint32_t>(rows.zeros[g]);
      ASSERT_EQ(zero, matrix_.zero(row, g));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, LayoutTest, testing::ValuesIn(layout_cases()), layout_name);

TEST(StoredIntegers, RefusesBadTensors) {
  std::mt19937_64 random(7);
  const TestIntegers four = random_integers(random, 4, 24, 96, 32, false);
  const TestIntegers eight = random_integers(random, 8, 24, 96, 0, true);
  const std::string packed = compressed_config("pack-quantized", 4, 32, false, false);
  const std::string bytes = compressed_config("int-quantized", 8, 0, true, true);
  const auto tensor = [](OneMatrix& m, const char* suffix) -> FileTensor& {
    return find_tensor(m.tensors, std::string(kModule) + suffix);
  };
  const auto erase = [](OneMatrix& m, const char* suffix) {
    std::erase_if(m.tensors, [&](const FileTensor& t) { return t.name == std::string(kModule) + suffix; });
  };
  const struct {
    std::string quantization;
    std::vector<FileTensor> tensors;
    std::function<void(OneMatrix&)> change;
    std::string message;
  } cases[] = {
      {packed, as_packed(kModule, four, false), [&](OneMatrix& m) { erase(m, ".weight_scale"); },
       "has no tensor \"model.layers.0.self_attn.q_proj.weight_scale\" of shape [24, 3]"},
      {packed, as_packed(kModule, four, false),
       [&](OneMatrix& m) {
         tensor(m, ".weight_scale").shape = {3, 24};
       },
       "weight_scale\" has shape [3, 24], but config.json asks for [24, 3]"},
      {packed, as_packed(kModule, four, false), [&](OneMatrix& m) { tensor(m, ".weight_scale").dtype = "I16"; },
       "weight_scale\" has dtype I16, must be F32, BF16 or F16"},
      {packed, as_packed(kModule, four, false), [&](OneMatrix& m) { tensor(m, ".weight_scale").data[3] = 0x7C; },
       "weight_scale\" holds "},
      {packed, as_packed(kModule, four, false), [&](OneMatrix& m) { tensor(m, ".weight_scale").data[1] ^= '\x80'; },
       "at element 0, a scale is not negative"},
      {packed, as_packed(kModule, four, false), [&](OneMatrix& m) { tensor(m, ".weight_shape").data[0] = 25; },
       "weight_shape\" must hold [24, 96]"},
      {packed, as_packed(kModule, four, false), [&](OneMatrix& m) { erase(m, ".weight_zero_point"); },
       "has no tensor \"model.layers.0.self_attn.q_proj.weight_zero_point\" of shape [3, 3]"},
      {compressed_config("pack-quantized", 4, 64, false, false), as_packed(kModule, four, false), [](OneMatrix&) {},
       "the group size 64 does not divide the 96 columns of model.layers.0.self_attn.q_proj"},
      {replaced(packed, "\"lm_head\"", "\"re:.*q_proj\""), as_packed(kModule, four, false), [](OneMatrix&) {},
       "weight_packed\" is quantised, but"},
      {bytes, as_packed(kModule, four, false), [](OneMatrix&) {}, "weight_packed\" does not fit"},
      {bytes, as_bytes(kModule, eight, true, false),
       [&](OneMatrix& m) {
         tensor(m, ".weight_scale").shape = {12, 2};
       },
       "has shape [12, 2], but config.json asks for [24, 1]"},
      {"", as_bytes(kModule, eight, true, true), [&](OneMatrix& m) { tensor(m, ".weight_offset").data[1] = 0x3C; },
       "weight_offset\" holds 1 at element 0, must be 0"},
      {kAwqConfig, as_awq(kModule, four),
       [&](OneMatrix& m) {
         tensor(m, ".qzeros").shape = {9, 1};
       },
       "qzeros\" has shape [9, 1], but config.json asks for [3, 3]"},
      {gptq_config(4, 32, false, "gptq"), as_gptq(kModule, four, false),
       [&](OneMatrix& m) { tensor(m, ".qzeros").data[0] = static_cast<char>(0xF0); },
       "qzeros\" has a zero point of 16 for output 1, must be at most 15"},
      {gptq_config(8, 0, true, "gptq_v2"), as_gptq(kModule, eight, false), [](OneMatrix&) {},
       "qzeros\" has a zero point of 127 for output 0, must be 128 since sym is true"},
      {gptq_config(4, 32, false, "gptq"), as_gptq(kModule, four, false),
       [&](OneMatrix& m) { tensor(m, ".g_idx").data[0] = 1; },
       "g_idx\" puts column 0 into group 1, must be 0: reordered columns (desc_act) are not supported"},
  };
  for (const auto& bad : cases) {
    OneMatrix folder;
    folder.quantization = bad.quantization;
    folder.tensors = bad.tensors;
    bad.change(folder);
    const std::unique_ptr<WeightSource> source = folder.open().value();
    const MatrixRef ref{std::string(kModule) + ".weight", 24, 96};
    Status status = source->check_matrix(ref);
    if (status.ok()) status = source->check_values(ref);
    ASSERT_FALSE(status.ok()) << bad.message;
    EXPECT_THAT(status.error().message, testing::HasSubstr(bad.message));
    EXPECT_THAT(status.error().message, testing::StartsWith(folder.dir.path()));
  }
}

// The same integers in every layout are the same model, bit for bit; kv_b of ds_base is decoded, gate and up are
// stacked.
TEST(StoredIntegers, EveryLayoutIsTheSameModel) {
  using Writer = std::function<std::vector<FileTensor>(const std::string&, const TestIntegers&)>;
  struct Layout {
    std::string quantization;
    Writer write;
  };
  const auto packed = [](bool is_symmetric) -> Writer {
    return [=](const std::string& module, const TestIntegers& m) { return as_packed(module, m, is_symmetric); };
  };
  const auto gptq = [](bool is_v2) -> Writer {
    return [=](const std::string& module, const TestIntegers& m) { return as_gptq(module, m, is_v2); };
  };
  const auto bytes = [](bool is_symmetric, bool has_offsets) -> Writer {
    return [=](const std::string& module, const TestIntegers& m) {
      return as_bytes(module, m, is_symmetric, has_offsets);
    };
  };
  const struct {
    int64_t bits;
    bool is_symmetric;
    std::vector<Layout> layouts;
  } families[] = {
      {4,
       false,
       {{compressed_config("pack-quantized", 4, 0, false, false), packed(false)},
        {replaced(kAwqConfig, "32", "-1"), as_awq},
        {gptq_config(4, 0, false, "gptq"), gptq(false)},
        {gptq_config(4, 0, false, "gptq_v2"), gptq(true)}}},
      {4,
       true,
       {{compressed_config("pack-quantized", 4, 0, true, false), packed(true)},
        {gptq_config(4, 0, true, "gptq"), gptq(false)}}},
      {8,
       true,
       {{compressed_config("pack-quantized", 8, 0, true, false), packed(true)},
        {gptq_config(8, 0, true, "gptq"), gptq(false)},
        {compressed_config("int-quantized", 8, 0, true, false), bytes(true, false)}}},
      {8,
       false,
       {{compressed_config("pack-quantized", 8, 0, false, false), packed(false)},
        {gptq_config(8, 0, false, "gptq_v2"), gptq(true)},
        {compressed_config("int-quantized", 8, 0, false, false), bytes(false, false)}}},
      {8, true, {{compressed_config("int-quantized", 8, 0, true, true), bytes(true, false)}, {"", bytes(true, true)}}},
  };
  const std::unique_ptr<kernels::Ops> ops = must_make_ops("auto", 2);
  for (const char* golden : {"qwen_base", "ds_base"}) {
    for (const auto& family : families) {
      Sequences::Logits first;
      for (const Layout& layout : family.layouts) {
        const TempDir dir;
        write_integer_model(dir, golden, layout.quantization, family.bits, family.is_symmetric, layout.write);
        const std::unique_ptr<Model> model = must_load(*ops, golden_options(dir.path(), ComputeType::kBf16));
        Sequences sequences(*ops, *model, {{3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8}});
        sequences.run(0, 8, 8);
        if (first.empty()) first = sequences.logits(0);
        for (const std::vector<float>& row : first) {
          for (const float value : row) ASSERT_TRUE(std::isfinite(value));
        }
        EXPECT_EQ(sequences.logits(0), first) << golden << " " << layout.quantization;
      }
    }
  }
}

// The vectorised quantiser and the kernels' definition give the same bits.
TEST(QuantiseRows, AgreesWithTheKernels) {
  constexpr uint64_t kSeed = 99;
  std::mt19937_64 random(kSeed);
  std::normal_distribution<float> normal;
  for (const int64_t k : {1, 31, 64, 75, 300, 1560}) {
    std::vector<float> values(static_cast<size_t>(5 * k));
    for (float& value : values) value = normal(random);
    for (int64_t i = 0; i < k; ++i) values[static_cast<size_t>(k + i)] = 0;
    values[0] = 1e-35F;
    kernels::HostMatrix dense;
    dense.data = reinterpret_cast<const std::byte*>(values.data());
    dense.dtype = kernels::DType::kF32;
    dense.n = 5;
    dense.k = k;
    for (const kernels::WeightType type : {kernels::WeightType::kInt8, kernels::WeightType::kInt4}) {
      for (const int64_t group : {0, 16, 128}) {
        const kernels::WeightFormat format{type, group, 8};
        IntegerBuffer buffer;
        buffer.resize(5, k, format, false);
        ASSERT_TRUE(quantise_rows(values.data(), 5, k, format, buffer.rows()));
        const kernels::HostMatrix ours = buffer.matrices(5)[0];
        for (int64_t row = 0; row < 5; ++row) {
          kernels::IntegerWeightRow expected;
          kernels::IntegerWeightRow taken;
          kernels::encode_weight_row(dense, row, format, &expected);
          kernels::encode_weight_row(ours, row, format, &taken);
          ASSERT_EQ(taken.codes, expected.codes) << "k " << k << " group " << group << " seed " << kSeed;
          ASSERT_EQ(taken.scales, expected.scales);
          ASSERT_EQ(taken.zeros, expected.zeros);
        }
      }
    }
    values[static_cast<size_t>(k)] = INFINITY;
    IntegerBuffer buffer;
    buffer.resize(5, k, {kernels::WeightType::kInt8, 0, 8}, false);
    EXPECT_FALSE(quantise_rows(values.data(), 5, k, {kernels::WeightType::kInt8, 0, 8}, buffer.rows()));
  }
}

}  // namespace
}  // namespace tandem::model
