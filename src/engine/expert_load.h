// Counts which experts the tokens of each step were routed to: for balancing, for files and for /metrics.
//
// The engine thread adds a step at a time; others take copies. One uncontended lock per step is all that they share.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "src/base/metrics.h"
#include "src/eplb/expert_load.h"
#include "src/eplb/load_window.h"
#include "src/model/batch.h"
#include "src/model/model.h"

namespace tandem::engine {

class ExpertLoadRecorder {
 public:
  // `info` must have MoE layers, and the model must keep its routing. Windows are of the last `window_steps` steps that
  // had tokens of their phase.
  ExpertLoadRecorder(const model::ModelInfo& info, const std::string& model_name, int64_t window_steps,
                     Registry& registry);

  // After model.forward(batch, …).
  void add_step(const model::Batch& batch, const model::Model& model);

  struct Counts {
    int64_t steps = 0;
    eplb::PhasedLoad load;
  };
  // What was counted since the last call, or the start.
  Counts take_new();
  struct Window {
    int64_t steps = 0;
    eplb::ExpertLoad load;
  };
  Window window(eplb::Phase phase) const;

  const std::vector<int64_t>& moe_layers() const { return moe_layers_; }
  int64_t num_experts() const { return num_experts_; }
  int64_t experts_per_token() const { return experts_per_token_; }
  const std::string& model_name() const { return model_name_; }

 private:
  // Of one phase.
  struct Tally {
    Tally(int64_t num_layers, int64_t num_experts, int64_t window_steps)
        : step(num_layers, num_experts), window(num_layers, num_experts, window_steps) {}
    eplb::ExpertLoad step;
    eplb::LoadWindow window;
    int64_t steps = 0;
    Counter* tokens = nullptr;
    std::vector<Gauge*> balance;
  };
  Tally& tally(eplb::Phase phase) { return phase == eplb::Phase::kPrompt ? prompt_ : generated_; }
  const Tally& tally(eplb::Phase phase) const { return phase == eplb::Phase::kPrompt ? prompt_ : generated_; }
  void register_metrics(Registry& registry);
  void finish_step(Tally& tally, eplb::ExpertLoad& unread);

  const std::string model_name_;
  const std::vector<int64_t> moe_layers_;
  const int64_t num_experts_;
  const int64_t experts_per_token_;
  mutable std::mutex mutex_;
  Tally prompt_;
  Tally generated_;
  Counts unread_;
};

}  // namespace tandem::engine
