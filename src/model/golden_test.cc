// Agreement with Hugging Face transformers: tests/golden holds tiny checkpoints and what transformers computes of them.
#include <cmath>
#include <nlohmann/json.hpp>

#include "src/model/checkpoint.h"
#include "src/model/test_support.h"

namespace tandem::model {
namespace {

// Largest difference of fp32 logits, relative to the largest golden logit.
constexpr double kLogitTolerance = 1e-4;
// A bf16 token is accepted if the fp32 model finds it at most this much less likely than its own choice.
constexpr double kNearTieNats = 0.5;

struct Prompt {
  std::vector<TokenId> ids;
  std::vector<TokenId> greedy;             // fp32, teacher of the greedy test
  std::vector<std::vector<float>> logits;  // [position][vocab]
};

struct Golden {
  double max_abs = 0;
  std::vector<Prompt> prompts;
};

Golden read_golden(const std::string& name) {
  Golden golden;
  const nlohmann::json json = nlohmann::json::parse(read_text(golden_path(name) + "/golden.json"));
  const std::string path = golden_path(name) + "/golden.safetensors";
  const std::string image = read_text(path);
  const std::vector<StoredTensor> tensors = parse_safetensors(std::as_bytes(std::span(image)), path).value();
  golden.max_abs = json["logits_max_abs"].get<double>();
  for (size_t i = 0; i < json["prompts"].size(); ++i) {
    Prompt prompt;
    prompt.ids = json["prompts"][i]["ids"].get<std::vector<TokenId>>();
    prompt.greedy = json["prompts"][i]["greedy_fp32"].get<std::vector<TokenId>>();
    for (const StoredTensor& tensor : tensors) {
      if (tensor.name != "logits." + std::to_string(i)) continue;
      const size_t vocab = static_cast<size_t>(tensor.shape.at(1));
      for (size_t row = 0; row < prompt.ids.size(); ++row) {
        std::vector<float>& values = prompt.logits.emplace_back(vocab);
        std::memcpy(values.data(), tensor.data.data() + row * vocab * sizeof(float), vocab * sizeof(float));
      }
    }
    EXPECT_EQ(prompt.logits.size(), prompt.ids.size());
    golden.prompts.push_back(std::move(prompt));
  }
  return golden;
}

double largest_error(const Sequences::Logits& ours, const std::vector<std::vector<float>>& golden) {
  EXPECT_EQ(ours.size(), golden.size());
  double error = 0;
  for (size_t row = 0; row < golden.size(); ++row) {
    EXPECT_EQ(ours[row].size(), golden[row].size());
    for (size_t i = 0; i < golden[row].size(); ++i) {
      const double difference = std::abs(static_cast<double>(ours[row][i]) - static_cast<double>(golden[row][i]));
      error = std::isnan(difference) ? INFINITY : std::max(error, difference);
    }
  }
  return error;
}

// Log-probability of `token` less that of the best token: at most 0.
double lead(std::span<const float> logits, TokenId token) {
  return static_cast<double>(logits[static_cast<size_t>(token)]) -
         static_cast<double>(*std::max_element(logits.begin(), logits.end()));
}

// The case and the backend.
class GoldenTest : public testing::TestWithParam<std::tuple<std::string, std::string>> {
 protected:
  std::string name() const { return std::get<0>(GetParam()); }

  const Golden golden_ = read_golden(name());
  const std::unique_ptr<kernels::Ops> ops_ = must_make_ops(std::get<1>(GetParam()));
  const std::unique_ptr<Model> model_ = must_load(*ops_, golden_options(golden_path(name()), ComputeType::kF32));
};

TEST_P(GoldenTest, LogitsOfPromptsInChunks) {
  double error = 0;
  for (const Prompt& prompt : golden_.prompts) {
    const int32_t length = static_cast<int32_t>(prompt.ids.size());
    for (const int32_t chunk : {1, 7, length}) {
      Sequences sequences(*ops_, *model_, {prompt.ids});
      sequences.run(0, length, chunk);
      error = std::max(error, largest_error(sequences.logits(0), prompt.logits));
    }
  }
  RecordProperty("relative_error", std::to_string(error / golden_.max_abs));
  std::printf("%s: largest error %.2e of %.3g\n", name().c_str(), error / golden_.max_abs, golden_.max_abs);
  EXPECT_LE(error, kLogitTolerance * golden_.max_abs);
}

// The absorbed form must agree as well, for one row at a time and for several.
TEST_P(GoldenTest, LogitsOfGeneratedTokens) {
  double error = 0;
  for (const Prompt& prompt : golden_.prompts) {
    for (const int32_t chunk : {1, 5}) {
      Sequences sequences(*ops_, *model_, {prompt.ids});
      sequences.run(0, static_cast<int32_t>(prompt.ids.size() / 2), 64, chunk);
      error = std::max(error, largest_error(sequences.logits(0), prompt.logits));
    }
  }
  EXPECT_LE(error, kLogitTolerance * golden_.max_abs);
}

TEST_P(GoldenTest, GreedyTokens) {
  for (const Prompt& prompt : golden_.prompts) {
    std::vector<TokenId> tokens = prompt.ids;
    tokens.insert(tokens.end(), prompt.greedy.begin(), prompt.greedy.end());
    Sequences sequences(*ops_, *model_, {tokens});
    sequences.run(0, static_cast<int32_t>(prompt.ids.size()), 64);
    for (size_t i = 0; i < prompt.greedy.size(); ++i) {
      // Teacher-forced, which is the same as free running as long as every token agrees.
      ASSERT_EQ(argmax(sequences.logits(0)[prompt.ids.size() - 1 + i]), prompt.greedy[i]) << "step " << i;
    }
  }
}

// bf16 weights and KV: our own greedy tokens, judged by our fp32 model on the same prefix.
TEST_P(GoldenTest, GreedyTokensInBf16AreNearTies) {
  const std::unique_ptr<Model> bf16 = must_load(*ops_, golden_options(golden_path(name()), ComputeType::kBf16));
  double worst = 0;
  for (const Prompt& prompt : golden_.prompts) {
    const size_t length = prompt.ids.size();
    std::vector<TokenId> tokens = prompt.ids;
    tokens.resize(length + prompt.greedy.size(), 0);
    Sequences sequences(*ops_, *bf16, {tokens});
    sequences.step({{0, static_cast<int32_t>(length), true}});
    for (size_t i = length; i < tokens.size(); ++i) {
      tokens[i] = argmax(sequences.logits(0).back());
      sequences.set_token(0, i, tokens[i]);
      sequences.step({{0, 1, false}});
    }
    Sequences oracle(*ops_, *model_, {tokens});
    oracle.run(0, static_cast<int32_t>(length), 64, 64);
    for (size_t i = length; i < tokens.size(); ++i) worst = std::min(worst, lead(oracle.logits(0)[i - 1], tokens[i]));
  }
  std::printf("%s: bf16 tokens at most %.3f nats behind\n", name().c_str(), -worst);
  EXPECT_GE(worst, -kNearTieNats);
}

INSTANTIATE_TEST_SUITE_P(Cases, GoldenTest,
                         testing::Combine(testing::Values("ds_base", "ds_no_q_lora", "ds_yarn", "ds_group1_mtp",
                                                          "ds_fp8", "qwen_base", "qwen_dense_layers", "qwen_tied",
                                                          "qwen_yarn", "qwen_fp8", "qwen_sharded"),
                                          testing::ValuesIn(kernels::available_backends())),
                         [](const testing::TestParamInfo<std::tuple<std::string, std::string>>& test) {
                           std::string name = std::get<0>(test.param) + "_" + std::get<1>(test.param);
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// The model of the demo: the logits of each prompt's last token, and 48 greedy tokens, prompt rows and generated rows
// in their own forms.
class DemoModelTest : public testing::TestWithParam<std::string> {};

TEST_P(DemoModelTest, AgreesWithTransformers) {
  const nlohmann::json json = nlohmann::json::parse(read_text(golden_path("demo") + "/golden.json"));
  std::vector<FileTensor> golden = read_tensors(golden_path("demo") + "/golden.safetensors");
  const std::unique_ptr<kernels::Ops> ops = must_make_ops(GetParam(), 2);
  const std::string path = std::string(TANDEM_SOURCE_DIR) + "/models/demo";
  const std::unique_ptr<Model> fp32 = must_load(*ops, golden_options(path, ComputeType::kF32));
  const std::unique_ptr<Model> bf16 = must_load(*ops, golden_options(path, ComputeType::kBf16));
  ASSERT_GT(json["prompts"].size(), 0U);
  for (size_t p = 0; p < json["prompts"].size(); ++p) {
    const std::vector<TokenId> ids = json["prompts"][p]["ids"].get<std::vector<TokenId>>();
    const std::vector<TokenId> greedy = json["prompts"][p]["greedy_fp32"].get<std::vector<TokenId>>();
    std::vector<TokenId> tokens = ids;
    tokens.insert(tokens.end(), greedy.begin(), greedy.end());
    Sequences sequences(*ops, *fp32, {tokens});
    sequences.run(0, static_cast<int32_t>(ids.size()), 64);
    const std::string& data = find_tensor(golden, "last_logits." + std::to_string(p)).data;
    std::vector<float> last(data.size() / sizeof(float));
    std::memcpy(last.data(), data.data(), data.size());
    float max_abs = 0;
    for (const float logit : last) max_abs = std::max(max_abs, std::abs(logit));
    EXPECT_LE(largest_error({sequences.logits(0)[ids.size() - 1]}, {last}),
              kLogitTolerance * static_cast<double>(max_abs));
    for (size_t i = 0; i < greedy.size(); ++i) {
      ASSERT_EQ(argmax(sequences.logits(0)[ids.size() - 1 + i]), greedy[i]) << "prompt " << p << " step " << i;
    }
    Sequences in_bf16(*ops, *bf16, {tokens});
    in_bf16.run(0, static_cast<int32_t>(ids.size()), 64);
    for (size_t i = 0; i < greedy.size(); ++i) {
      const TokenId token = argmax(in_bf16.logits(0)[ids.size() - 1 + i]);
      EXPECT_GE(lead(sequences.logits(0)[ids.size() - 1 + i], token), -kNearTieNats) << "prompt " << p << " step " << i;
    }
  }
}

// Without the plain backend, which takes half a minute for this.
std::vector<std::string> fast_backends() {
  std::vector<std::string> backends = kernels::available_backends();
  std::erase(backends, "ref");
  return backends;
}

INSTANTIATE_TEST_SUITE_P(Backends, DemoModelTest, testing::ValuesIn(fast_backends()),
                         [](const testing::TestParamInfo<std::string>& test) {
                           std::string name = test.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace tandem::model
