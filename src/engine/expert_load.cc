#include "src/engine/expert_load.h"

#include "src/base/check.h"
#include "src/eplb/balance.h"

namespace tandem::engine {
namespace {

// Balance is computed this often; it costs as much as counting a step.
constexpr int64_t kStepsPerBalance = 32;

}  // namespace

ExpertLoadRecorder::ExpertLoadRecorder(const model::ModelInfo& info, const std::string& model_name,
                                       int64_t window_steps, Registry& registry)
    : model_name_(model_name),
      moe_layers_(info.moe_layers),
      num_experts_(info.num_experts),
      experts_per_token_(info.experts_per_token),
      prompt_(std::ssize(moe_layers_), num_experts_, window_steps),
      generated_(std::ssize(moe_layers_), num_experts_, window_steps) {
  CHECK(!moe_layers_.empty());
  unread_.load = eplb::PhasedLoad(std::ssize(moe_layers_), num_experts_);
  register_metrics(registry);
}

void ExpertLoadRecorder::register_metrics(Registry& registry) {
  for (const eplb::Phase phase : eplb::kPhases) {
    MetricLabels labels{{"model_name", model_name_}, {"phase", eplb::phase_name(phase)}};
    tally(phase).tokens = &registry.counter("tandem:expert_load_tokens_total",
                                            "Tokens routed to experts, over all MoE layers, once per expert.", labels);
    labels.emplace_back("layers", "");
    for (const char* layers : {"overall", "p50", "p99", "worst"}) {
      labels.back().second = layers;
      tally(phase).balance.push_back(
          &registry.gauge("tandem:expert_load_balance",
                          "Mean / max of the experts' tokens in the window: of all MoE layers together, what half and "
                          "99 % of them reach, and the worst.",
                          labels));
      tally(phase).balance.back()->set(1);
    }
  }
}

void ExpertLoadRecorder::add_step(const model::Batch& batch, const model::Model& model) {
  const std::lock_guard<std::mutex> lock(mutex_);
  prompt_.step.clear();
  generated_.step.clear();
  const size_t top_k = static_cast<size_t>(experts_per_token_);
  for (int64_t l = 0; l < std::ssize(moe_layers_); ++l) {
    const std::span<const int32_t> routed = model.routed_experts(l);
    CHECK_EQ(routed.size(), batch.tokens.size() * top_k);
    for (const model::Chunk& chunk : batch.chunks) {
      const std::span<int64_t> tokens =
          tally(chunk.is_prompt ? eplb::Phase::kPrompt : eplb::Phase::kGenerated).step.layer(l);
      const size_t first = static_cast<size_t>(chunk.first_row) * top_k;
      for (const int32_t expert : routed.subspan(first, static_cast<size_t>(chunk.num_rows) * top_k)) {
        ++tokens[static_cast<size_t>(expert)];
      }
    }
  }
  ++unread_.steps;
  finish_step(prompt_, unread_.load.prompt);
  finish_step(generated_, unread_.load.generated);
}

void ExpertLoadRecorder::finish_step(Tally& tally, eplb::ExpertLoad& unread) {
  const int64_t total = tally.step.total();
  if (total == 0) return;
  unread.add(tally.step);
  tally.window.add_step(tally.step);
  tally.tokens->add(static_cast<uint64_t>(total));
  if (tally.steps++ % kStepsPerBalance != 0) return;
  const eplb::BalanceReport report = eplb::report_expert_balance(tally.window.total());
  tally.balance[0]->set(report.overall);
  tally.balance[1]->set(report.p50);
  tally.balance[2]->set(report.p99);
  tally.balance[3]->set(report.worst);
}

ExpertLoadRecorder::Counts ExpertLoadRecorder::take_new() {
  Counts taken;
  taken.load = eplb::PhasedLoad(std::ssize(moe_layers_), num_experts_);
  const std::lock_guard<std::mutex> lock(mutex_);
  std::swap(taken, unread_);
  return taken;
}

ExpertLoadRecorder::Window ExpertLoadRecorder::window(eplb::Phase phase) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {tally(phase).window.num_steps(), tally(phase).window.total()};
}

}  // namespace tandem::engine
