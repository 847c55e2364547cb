// What the integer formats cost in quality, on a trained model: the demo, which knows its text by heart. Thresholds are
// about one and a half times what was measured; the test prints what it finds.
#include <cmath>
#include <nlohmann/json.hpp>

#include "src/model/checkpoint.h"
#include "src/model/device_tensor.h"
#include "src/model/test_support.h"

namespace tandem::model {
namespace {

struct QualityCase {
  QuantizationRequest request;
  double linear_error;  // largest relative error (root mean square) of one matrix's outputs; of the head, if it has a
                        // format of its own
  double divergence;    // mean of KL(bf16 || quantised) over generated positions, nats
  double agreement;     // least share of positions whose best token is bf16's
};

// At 4 bits every matrix is off by a tenth, and a model that spends all its capacity on knowing a text by heart loses
// it: these rows guard the arithmetic, they do not recommend the format for such a model.
const QualityCase kCases[] = {
    {{"wint8", 0}, 0.0115, 0.035, 0.94},
    {{"w8a8", 0}, 0.0165, 0.19, 0.90},
    {{"wint4", 0}, 0.20, 12, 0.25},
    {{"wint4", 128}, 0.19, 11.5, 0.27},
    {{"wint4", 32}, 0.155, 7, 0.42},
    {{"w4a8", 0}, 0.19, 11.5, 0.27},
    {{"auto", 0, "int8"}, 0.011, 0.00045, 0.99},
    {{"auto", 0, "int4"}, 0.18, 0.115, 0.92},
    {{"w8a8", 0, "int4"}, 0.18, 0.29, 0.90},
    {{"w4a8", 0, "int4"}, 0.18, 11.5, 0.27},
};

constexpr TokenId kEndOfAnswer = 1;  // what follows it means nothing

std::string demo_path() { return std::string(TANDEM_SOURCE_DIR) + "/models/demo"; }

double divergence(std::span<const float> from, std::span<const float> to) {
  const auto log_sum = [](std::span<const float> logits) {
    const double top = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float logit : logits) sum += std::exp(logit - top);
    return top + std::log(sum);
  };
  const double from_sum = log_sum(from);
  const double to_sum = log_sum(to);
  double total = 0;
  for (size_t i = 0; i < from.size(); ++i) {
    const double log_p = from[i] - from_sum;
    total += std::exp(log_p) * (log_p - (to[i] - to_sum));
  }
  return total;
}

std::string case_name(const QuantizationRequest& request) {
  return fmt::format("{}_g{}{}", request.name, request.group_size,
                     request.lm_head == "auto" ? "" : "_head_" + request.lm_head);
}

class QualityTest : public testing::TestWithParam<QualityCase> {
 protected:
  const std::unique_ptr<kernels::Ops> ops_ = must_make_ops("auto", 2);
};

// The verses of the golden file: the prompt, then the tokens of the unquantised model in fp32.
TEST_P(QualityTest, VersesOfTheDemo) {
  LoadOptions options = golden_options(demo_path(), ComputeType::kBf16);
  const std::unique_ptr<Model> plain = must_load(*ops_, options);
  options.quantization = GetParam().request;
  const std::unique_ptr<Model> quantised = must_load(*ops_, options);
  EXPECT_LT(quantised->info().weight_bytes, plain->info().weight_bytes);
  const nlohmann::json json = nlohmann::json::parse(read_text(golden_path("demo") + "/golden.json"));
  double total = 0;
  int64_t positions = 0;
  int64_t same = 0;
  for (const nlohmann::json& prompt : json["prompts"]) {
    std::vector<TokenId> tokens = prompt["ids"].get<std::vector<TokenId>>();
    const int32_t length = static_cast<int32_t>(tokens.size());
    std::vector<TokenId> greedy = prompt["greedy_fp32"].get<std::vector<TokenId>>();
    greedy.erase(std::find(greedy.begin(), greedy.end(), kEndOfAnswer), greedy.end());
    tokens.insert(tokens.end(), greedy.begin(), greedy.end());
    Sequences expected(*ops_, *plain, {tokens});
    Sequences found(*ops_, *quantised, {tokens});
    expected.run(0, length, 64, 64);
    found.run(0, length, 64, 64);
    for (size_t i = static_cast<size_t>(length) - 1; i < tokens.size(); ++i) {
      total += divergence(expected.logits(0)[i], found.logits(0)[i]);
      same += argmax(expected.logits(0)[i]) == argmax(found.logits(0)[i]) ? 1 : 0;
      ++positions;
    }
  }
  const double mean = total / static_cast<double>(positions);
  const double agreement = static_cast<double>(same) / static_cast<double>(positions);
  std::printf("%s: KL %.2e nats, %.2f %% of %lld tokens agree\n", case_name(GetParam().request).c_str(), mean,
              agreement * 100, static_cast<long long>(positions));
  EXPECT_LE(mean, GetParam().divergence);
  EXPECT_GE(agreement, GetParam().agreement);
}

// Every quantised matrix of the demo alone, on normal inputs, against the same in fp32.
TEST_P(QualityTest, EveryMatrixOfTheDemo) {
  constexpr uint64_t kSeed = 1611;
  constexpr int64_t kRows = 16;
  const WeightFormats formats = choose_formats(GetParam().request, {}, false, true, kernels::kBf16Weights).value();
  const std::unique_ptr<Checkpoint> checkpoint = Checkpoint::open(demo_path()).value();
  const std::unique_ptr<kernels::Stream> stream = ops_->make_stream();
  std::mt19937_64 random(kSeed);
  std::normal_distribution<float> normal;
  double worst = 0;
  std::string worst_name;
  int64_t matrices = 0;
  const bool is_head = GetParam().request.lm_head != "auto";
  const kernels::WeightFormat format_of_test = is_head ? *formats.head : *formats.linear;
  std::vector<std::string> names;
  for (const char* name : {"self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa",
                           "self_attn.o_proj", "mlp.experts.0.gate_proj", "mlp.experts.7.up_proj",
                           "mlp.experts.15.down_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"}) {
    for (int layer = 1; layer < 5 && !is_head; ++layer) {
      names.push_back(fmt::format("model.layers.{}.{}.weight", layer, name));
    }
  }
  if (is_head) names.push_back("lm_head.weight");
  for (const std::string& name : names) {
    const StoredTensor* tensor = checkpoint->find(name);
    ASSERT_NE(tensor, nullptr) << name;
    kernels::HostMatrix matrix;
    matrix.data = tensor->data.data();
    matrix.dtype = *tensor->kernel_dtype;
    matrix.n = tensor->shape[0];
    matrix.k = tensor->shape[1];
    std::vector<float> x(static_cast<size_t>(kRows * matrix.k));
    for (float& value : x) value = normal(random);
    const DeviceTensor input(*ops_, kernels::DType::kF32, kRows, matrix.k);
    input.upload<float>(*ops_, *stream, x);
    const auto multiply = [&](const kernels::WeightFormat& format) {
      const std::unique_ptr<kernels::Weight> weight = ops_->pack_weight(std::span(&matrix, 1), format);
      const DeviceTensor output(*ops_, kernels::DType::kF32, kRows, matrix.n);
      ops_->linear(*stream, input.all(), *weight, output.all());
      std::vector<float> y(static_cast<size_t>(kRows * matrix.n));
      ops_->read_back(*stream, output.all().address, std::as_writable_bytes(std::span(y)));
      return y;
    };
    const std::vector<float> expected = multiply(kernels::kF32Weights);
    const std::vector<float> found = multiply(format_of_test);
    double error = 0;
    double size = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      error += std::pow(static_cast<double>(found[i]) - static_cast<double>(expected[i]), 2);
      size += std::pow(static_cast<double>(expected[i]), 2);
    }
    ++matrices;
    if (std::sqrt(error / size) <= worst) continue;
    worst = std::sqrt(error / size);
    worst_name = tensor->name;
  }
  std::printf("%s: largest error of %lld matrices %.2e (%s), seed %llu\n", case_name(GetParam().request).c_str(),
              static_cast<long long>(matrices), worst, worst_name.c_str(), static_cast<unsigned long long>(kSeed));
  EXPECT_GT(worst, 0);
  EXPECT_LE(worst, GetParam().linear_error);
}

INSTANTIATE_TEST_SUITE_P(Formats, QualityTest, testing::ValuesIn(kCases),
                         [](const testing::TestParamInfo<QualityCase>& test) { return case_name(test.param.request); });

}  // namespace
}  // namespace tandem::model
