// The second half of every layer: a dense SwiGLU MLP, or routed experts with or without shared ones. The families name
// and compute these alike, so they differ only by config.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "src/model/batch.h"
#include "src/model/config.h"
#include "src/model/device_tensor.h"
#include "src/model/expert_exchange.h"
#include "src/model/expert_store.h"
#include "src/model/routing_simulation.h"
#include "src/model/tensor_exchange.h"
#include "src/model/weights.h"

namespace tandem::model {

// Rows of a step that go through a layer together: all, or one of two parts.
struct MlpRows {
  int lane = 0;           // of the exchange; 0 or 1
  int64_t first_row = 0;  // in the step
  kernels::Tensor hidden;  // [T, H]; T = 0 only with an exchange: this rank then computes what others send
  kernels::Tensor out;     // [T, H]
};

class MlpLayers final : public ExpertStore {
 public:
  MlpLayers(kernels::Ops& ops, kernels::Stream& stream, const ModelConfig& config);

  // Before list_weights: only the experts of the exchange's shard are loaded, and rows travel through it.
  void set_exchange(ExpertExchange* exchange) { exchange_ = exchange; }
  // With tensor parallelism: `out` of finish() is summed and shared over the ranks.
  void set_tensor(TensorExchange* tensor) { tensor_ = tensor; }
  // Lists the tensors of layer `layer`; `prefix` is "model.layers.3.mlp.".
  void list_weights(WeightPlan& plan, int64_t layer, const std::string& prefix);
  void allocate(int64_t max_rows);
  // Once listed: of the routed experts of each MoE layer.
  std::vector<kernels::WeightFormat> expert_formats() const;
  // Where experts can be read again from; without it reload() is a bug.
  void keep_source(std::shared_ptr<const WeightSource> source, WeightFormats formats);
  // Before allocate(): the routing of every layer is kept until read_routing, and chosen by a simulation if it is on.
  void set_routing(bool is_kept, const RoutingSimulation& simulation);
  // Before the first layer of a step.
  void begin_step(const Batch& batch);
  // out = MLP of layer `layer` of hidden, in three steps, each done with all parts before the next one: rows leave for
  // their experts, this rank's experts compute what has come, outputs are summed up. Between two of them a part's rows or
  // outputs may travel; its hidden must stay as it is. Faults are those of the exchange.
  Status send(int64_t layer, const MlpRows& part);
  Status compute(int64_t layer, const MlpRows& part);
  Status finish(int64_t layer, const MlpRows& part);
  // After the last layer, once the stream is done: fetches the kept routing of the step's rows.
  void read_routing(int64_t rows);
  // Of the `index`-th MoE layer, [rows, top_k].
  std::span<const int32_t> routed_experts(int64_t index) const;

  // mlp_experts.cc
  int64_t num_layers() const override { return num_moe_layers_; }
  int64_t num_slots() const override;
  std::array<int64_t, 2> slot_bytes(int64_t layer) const override;
  std::string layout() const override;
  ExpertMemory slot(int64_t layer, int64_t slot) override;
  ExpertMemory make_spare() override;
  ExpertMemory replace(int64_t layer, int64_t slot, const ExpertMemory& memory) override;
  Status reload(int64_t layer, int64_t slot, int32_t expert) override;

 private:
  struct Dense {
    int64_t width = 0;
    std::unique_ptr<kernels::Weight> gate_up;  // [2 width, H], gate first
    std::unique_ptr<kernels::Weight> down;     // [H, width]
  };
  struct Layer {
    int64_t moe_index = -1;                   // among the MoE layers
    std::string expert_prefix;                // "model.layers.3.mlp.experts."
    kernels::WeightFormat expert_format;      // of gate_up
    Dense dense;                              // or the shared experts of an MoE layer
    std::unique_ptr<kernels::Weight> router;  // [E, H]; null in a dense layer
    DeviceTensor correction_bias;
    std::unique_ptr<kernels::Weight> expert_gate_up;  // E x [2 I, H]
    std::unique_ptr<kernels::Weight> expert_down;     // E x [H, I]
  };
  void list_dense(WeightPlan& plan, Dense& dense, int64_t width, const std::string& prefix);
  void list_experts(WeightPlan& plan, Layer& layer) const;
  void list_experts(WeightPlan& plan, const Layer& layer, std::span<const int32_t> chosen,
                    std::unique_ptr<kernels::Weight>& gate_up, std::unique_ptr<kernels::Weight>& down) const;
  Layer& moe_layer(int64_t index);
  const Layer& moe_layer(int64_t index) const { return const_cast<MlpLayers*>(this)->moe_layer(index); }
  void forward_dense(const Dense& dense, const kernels::Tensor& hidden, const kernels::Tensor& out);
  RowRange own_rows(const MlpRows& part) const;
  void route(const Layer& layer, int64_t first_row, const kernels::Tensor& hidden);
  void compute_own_experts(const Layer& layer, const MlpRows& part);
  Status compute_arrived(const Layer& layer, ExpertExchange& exchange);
  kernels::Tensor expert_ids(const Layer& layer, int64_t first_row, int64_t rows) const;
  kernels::Tensor own_outputs(const MlpRows& part) const;
  void simulate_routing(const Layer& layer, int64_t first_row, const kernels::Tensor& ids,
                        const kernels::Tensor& weights);

  kernels::Ops& ops_;
  kernels::Stream& stream_;
  const ModelConfig& config_;
  ExpertExchange* exchange_ = nullptr;
  TensorExchange* tensor_ = nullptr;
  std::vector<Layer> layers_;
  std::shared_ptr<const WeightSource> source_;  // null unless kept
  WeightFormats source_formats_;
  std::vector<std::unique_ptr<kernels::Buffer>> spares_;
  DeviceTensor gate_up_;         // [T, 2 width]
  DeviceTensor activated_;       // [T, width]
  DeviceTensor router_logits_;   // [T, E]
  DeviceTensor expert_ids_;      // [T, k]; of each MoE layer if routing is kept
  DeviceTensor expert_weights_;  // [T, k]
  // Without an exchange, which has its own.
  DeviceTensor order_;           // [T k, 1]
  DeviceTensor offsets_;         // [E + 1, 1]
  DeviceTensor expert_out_;      // [T k, H]
  DeviceTensor shared_out_;      // [T, H]

  int64_t num_moe_layers_ = 0;
  bool keeps_routing_ = false;
  int64_t kept_rows_ = 0;              // of the last step
  std::vector<int32_t> kept_routing_;  // [MoE layers, kept rows, k]
  std::optional<SimulatedRouter> simulated_;
  std::vector<int32_t> simulated_ids_;    // [MoE layers, rows of the step, k]
  std::vector<float> simulated_weights_;  // [rows of the step, k]: all alike
};

}  // namespace tandem::model
