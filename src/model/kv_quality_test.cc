// What an fp8 KV cache costs in quality, beside what bf16 weights and activations cost already.
#include <cmath>
#include <nlohmann/json.hpp>

#include "src/model/test_support.h"

namespace tandem::model {
namespace {

// Bounds of a row's root mean square difference from the f32 model's logits, relative to those logits: the median of
// all rows, since rows where rounding makes experts swap are far off in any format. And of the share of rows for which
// the f32 model's first token is kept.
struct Bounds {
  double bf16_median_error;
  double fp8_median_error;
  double fp8_agreement;
};

struct Quality {
  double median_error = 0;
  double agreement = 0;
};

using Logits = Sequences::Logits;

double relative_difference(const std::vector<float>& a, const std::vector<float>& exact) {
  double difference = 0;
  double size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(exact[i]), 2);
    size += std::pow(static_cast<double>(exact[i]), 2);
  }
  return std::sqrt(difference / size);
}

// Rows of all prompts of a golden case and the f32 model's answers to them; of MLA both forms.
std::vector<Logits> run_case(kernels::Ops& ops, const std::string& golden, LoadOptions options) {
  const nlohmann::json json = nlohmann::json::parse(read_text(golden_path(golden) + "/golden.json"));
  const std::unique_ptr<Model> model = must_load(ops, options);
  std::vector<Logits> logits;
  for (const nlohmann::json& prompt : json["prompts"]) {
    std::vector<TokenId> tokens = prompt["ids"].get<std::vector<TokenId>>();
    const int32_t length = static_cast<int32_t>(tokens.size());
    const std::vector<TokenId> answer = prompt["greedy_fp32"].get<std::vector<TokenId>>();
    tokens.insert(tokens.end(), answer.begin(), answer.end());
    Sequences sequences(ops, *model, {tokens});
    sequences.run(0, length, 64);
    logits.push_back(sequences.logits(0));
  }
  return logits;
}

Quality compare(const std::vector<Logits>& logits, const std::vector<Logits>& exact) {
  std::vector<double> errors;
  double agreeing = 0;
  for (size_t p = 0; p < exact.size(); ++p) {
    for (size_t i = 0; i < exact[p].size(); ++i) {
      errors.push_back(relative_difference(logits[p][i], exact[p][i]));
      agreeing += argmax(logits[p][i]) == argmax(exact[p][i]) ? 1 : 0;
    }
  }
  std::sort(errors.begin(), errors.end());
  return {errors[errors.size() / 2], agreeing / static_cast<double>(errors.size())};
}

void expect_quality(const std::string& golden, const std::string& path, const Bounds& bounds) {
  const std::unique_ptr<kernels::Ops> ops = must_make_ops("auto", 2);
  const std::vector<Logits> exact = run_case(*ops, golden, golden_options(path, ComputeType::kF32));
  LoadOptions options = golden_options(path, ComputeType::kBf16);
  const Quality bf16 = compare(run_case(*ops, golden, options), exact);
  options.kv_cache = KvCacheType::kF8E4M3;
  const Quality fp8 = compare(run_case(*ops, golden, options), exact);
  std::printf("%s, KV in bf16: median error %.4f, %.3f agree; in fp8: %.4f, %.3f\n", golden.c_str(), bf16.median_error,
              bf16.agreement, fp8.median_error, fp8.agreement);
  EXPECT_LE(bf16.median_error, bounds.bf16_median_error);
  EXPECT_LE(fp8.median_error, bounds.fp8_median_error);
  EXPECT_GE(fp8.agreement, bounds.fp8_agreement);
  EXPECT_GT(fp8.median_error, bf16.median_error);  // or the cache was not fp8
}

TEST(KvQuality, LatentsInFp8) {
  expect_quality("demo", std::string(TANDEM_SOURCE_DIR) + "/models/demo",
                 {.bf16_median_error = 0.02, .fp8_median_error = 0.05, .fp8_agreement = 0.92});
}

// A small model with random weights.
TEST(KvQuality, KeysAndValuesInFp8) {
  expect_quality("qwen_base", golden_path("qwen_base"),
                 {.bf16_median_error = 0.006, .fp8_median_error = 0.04, .fp8_agreement = 0.95});
}

}  // namespace
}  // namespace tandem::model
