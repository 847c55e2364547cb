#include "src/engine/expert_load.h"

#include <gtest/gtest.h>

#include "src/engine/fake_model.h"

namespace tandem::engine {
namespace {

// Two MoE layers of four experts; row r goes to experts (r + layer) and (r + layer + 1), modulo four.
class RoutedModel final : public model::Model {
 public:
  RoutedModel() {
    info_.moe_layers = {1, 3};
    info_.num_experts = 4;
    info_.experts_per_token = 2;
  }
  const model::ModelInfo& info() const override { return info_; }
  Status forward(const model::Batch& batch, model::KvCache&, const model::LayerDone&) override {
    route(batch);
    return {};
  }
  void route(const model::Batch& batch) {
    for (int32_t l = 0; l < 2; ++l) {
      std::vector<int32_t>& ids = ids_[static_cast<size_t>(l)];
      ids.clear();
      for (int32_t r = 0; r < static_cast<int32_t>(batch.tokens.size()); ++r) {
        ids.insert(ids.end(), {(r + l) % 4, (r + l + 1) % 4});
      }
    }
  }
  std::span<const float> logits(size_t) const override { return {}; }
  std::span<const int32_t> routed_experts(int64_t index) const override { return ids_[static_cast<size_t>(index)]; }

 private:
  model::ModelInfo info_;
  std::array<std::vector<int32_t>, 2> ids_;
};

model::Chunk chunk_of(int32_t first_row, int32_t num_rows, bool is_prompt) {
  model::Chunk chunk;
  chunk.first_row = first_row;
  chunk.num_rows = num_rows;
  chunk.is_prompt = is_prompt;
  return chunk;
}

// Three prompt rows and one generated row.
model::Batch make_batch() {
  model::Batch batch;
  batch.tokens = {1, 2, 3, 4};
  batch.chunks = {chunk_of(0, 1, true), chunk_of(1, 1, false), chunk_of(2, 2, true)};
  return batch;
}

std::vector<int64_t> layer_of(const eplb::ExpertLoad& load, int64_t layer) {
  return {load.layer(layer).begin(), load.layer(layer).end()};
}

TEST(ExpertLoadRecorder, SplitsPromptAndGeneratedTokens) {
  RoutedModel model;
  Registry registry;
  ExpertLoadRecorder recorder(model.info(), "m", 100, registry);
  const model::Batch batch = make_batch();
  model.route(batch);
  recorder.add_step(batch, model);
  recorder.add_step(batch, model);
  const ExpertLoadRecorder::Counts counts = recorder.take_new();
  EXPECT_EQ(counts.steps, 2);
  // Rows 0, 2, 3 are prompt: experts 0 1, 2 3, 3 0 in layer 0; row 1 is generated: 1 2.
  EXPECT_EQ(layer_of(counts.load.prompt, 0), (std::vector<int64_t>{4, 2, 2, 4}));
  EXPECT_EQ(layer_of(counts.load.prompt, 1), (std::vector<int64_t>{4, 4, 2, 2}));
  EXPECT_EQ(layer_of(counts.load.generated, 0), (std::vector<int64_t>{0, 2, 2, 0}));
  EXPECT_EQ(layer_of(counts.load.generated, 1), (std::vector<int64_t>{0, 0, 2, 2}));
  EXPECT_EQ(recorder.window(eplb::Phase::kPrompt).load, counts.load.prompt);
  EXPECT_EQ(recorder.window(eplb::Phase::kGenerated).steps, 2);
}

TEST(ExpertLoadRecorder, GivesEachCountOnceAndKeepsTheWindow) {
  RoutedModel model;
  Registry registry;
  ExpertLoadRecorder recorder(model.info(), "m", 2, registry);
  const model::Batch batch = make_batch();
  model.route(batch);
  recorder.add_step(batch, model);
  EXPECT_EQ(recorder.take_new().steps, 1);
  const ExpertLoadRecorder::Counts nothing = recorder.take_new();
  EXPECT_EQ(nothing.steps, 0);
  EXPECT_EQ(nothing.load, eplb::PhasedLoad(2, 4));
  // A step without generated tokens leaves their window alone.
  model::Batch prompt = make_batch();
  for (model::Chunk& chunk : prompt.chunks) chunk.is_prompt = true;
  for (int i = 0; i < 5; ++i) recorder.add_step(prompt, model);
  EXPECT_EQ(recorder.window(eplb::Phase::kPrompt).steps, 2);
  EXPECT_EQ(recorder.window(eplb::Phase::kGenerated).steps, 1);
  EXPECT_EQ(recorder.window(eplb::Phase::kGenerated).load.total(), 4);
}

TEST(ExpertLoadRecorder, ShowsTokensAndBalance) {
  RoutedModel model;
  Registry registry;
  ExpertLoadRecorder recorder(model.info(), "m", 100, registry);
  const model::Batch batch = make_batch();
  model.route(batch);
  recorder.add_step(batch, model);
  const std::string text = registry.expose();
  EXPECT_NE(text.find("tandem:expert_load_tokens_total{model_name=\"m\",phase=\"prompt\"} 12\n"), std::string::npos)
      << text;
  EXPECT_NE(text.find("tandem:expert_load_tokens_total{model_name=\"m\",phase=\"generated\"} 4\n"), std::string::npos);
  // Prompt: 2 1 1 2 and 2 2 1 1, mean 1.5 of 2; generated: two of four experts.
  EXPECT_NE(text.find("tandem:expert_load_balance{model_name=\"m\",phase=\"prompt\",layers=\"overall\"} 0.75\n"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("tandem:expert_load_balance{model_name=\"m\",phase=\"generated\",layers=\"worst\"} 0.5\n"),
            std::string::npos);
}

}  // namespace
}  // namespace tandem::engine
