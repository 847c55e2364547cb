// The second half of every layer: a dense SwiGLU MLP, or routed experts with or without shared ones. The families name
// and compute these alike, so they differ only by config.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "src/model/config.h"
#include "src/model/device_tensor.h"
#include "src/model/weights.h"

namespace tandem::model {

class MlpLayers {
 public:
  MlpLayers(kernels::Ops& ops, kernels::Stream& stream, const ModelConfig& config);

  // Lists the tensors of layer `layer`; `prefix` is "model.layers.3.mlp.".
  void list_weights(WeightPlan& plan, int64_t layer, const std::string& prefix);
  void allocate(int64_t max_rows);
  // out [T, H] = MLP of layer `layer` of hidden [T, H].
  void forward(int64_t layer, const kernels::Tensor& hidden, const kernels::Tensor& out);

 private:
  struct Dense {
    int64_t width = 0;
    std::unique_ptr<kernels::Weight> gate_up;  // [2 width, H], gate first
    std::unique_ptr<kernels::Weight> down;     // [H, width]
  };
  struct Layer {
    Dense dense;                              // or the shared experts of an MoE layer
    std::unique_ptr<kernels::Weight> router;  // [E, H]; null in a dense layer
    DeviceTensor correction_bias;
    std::unique_ptr<kernels::Weight> expert_gate_up;  // E x [2 I, H]
    std::unique_ptr<kernels::Weight> expert_down;     // E x [H, I]
  };
  void list_dense(WeightPlan& plan, Dense& dense, int64_t width, const std::string& prefix);
  void list_experts(WeightPlan& plan, Layer& layer, const std::string& prefix);
  void forward_dense(const Dense& dense, const kernels::Tensor& hidden, const kernels::Tensor& out);
  void forward_experts(const Layer& layer, const kernels::Tensor& hidden, const kernels::Tensor& out);

  kernels::Ops& ops_;
  kernels::Stream& stream_;
  const ModelConfig& config_;
  std::vector<Layer> layers_;
  DeviceTensor gate_up_;         // [T, 2 width]
  DeviceTensor activated_;       // [T, width]
  DeviceTensor router_logits_;   // [T, E]
  DeviceTensor expert_ids_;      // [T, k]
  DeviceTensor expert_weights_;  // [T, k]
  DeviceTensor order_;           // [T k, 1]
  DeviceTensor offsets_;         // [E + 1, 1]
  DeviceTensor expert_out_;      // [T k, H]
  DeviceTensor shared_out_;      // [T, H]
};

}  // namespace tandem::model
