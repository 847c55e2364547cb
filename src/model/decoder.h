// The decoder that all families share: embedding, layers of attention and MLP with a norm before each, final norm and
// head. A family brings its Attention; MlpLayers does the rest of a layer.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "src/model/family.h"
#include "src/model/mlp.h"
#include "src/model/model.h"
#include "src/model/step.h"

namespace tandem::model {

class Decoder final : public Model {
 public:
  Decoder(kernels::Ops& ops, ModelConfig config);

  const ModelConfig& config() const { return config_; }
  void keep_source(std::shared_ptr<const WeightSource> source, WeightFormats formats) {
    mlp_.keep_source(std::move(source), std::move(formats));
  }
  // Before list_weights().
  void set_exchange(ExpertExchange* exchange) { exchange_ = exchange, mlp_.set_exchange(exchange); }
  // As the config says, which is then this rank's share (tensor_split.h).
  void set_tensor(TensorExchange* tensor) { tensor_ = tensor, mlp_.set_tensor(tensor); }
  // Lists every tensor of the model; `plan` must be made for stream().
  void list_weights(WeightPlan& plan);
  // What the cache must look like.
  KvLayout make_kv_layout(int64_t block_size, kernels::DType kv_dtype) const;
  // Before allocate().
  void set_routing(bool is_kept, const RoutingSimulation& simulation) { mlp_.set_routing(is_kept, simulation); }
  // Once listed: what an exchange has to carry.
  ExchangeShape exchange_shape(const Capacity& capacity) const;
  TensorShape tensor_shape(const Capacity& capacity) const;
  // Allocates all scratch memory, once the weights are there.
  void allocate(const Capacity& capacity, int64_t block_size, kernels::DType kv_dtype, ModelInfo info);
  kernels::Stream& stream() { return *stream_; }

  const ModelInfo& info() const override { return info_; }
  Status forward(const Batch& batch, KvCache& cache, const LayerDone& on_layer_done) override;
  std::span<const float> logits(size_t index) const override;
  std::span<const int32_t> routed_experts(int64_t index) const override { return mlp_.routed_experts(index); }
  ExpertStore* expert_store() override { return info_.moe_layers.empty() ? nullptr : &mlp_; }

 private:
  struct Norms {
    DeviceTensor attention;
    DeviceTensor mlp;
  };
  // What each part of a step has in the buffers that are here for all rows.
  struct Lane {
    const Step* step = nullptr;
    kernels::Tensor residual;
    MlpRows mlp;  // hidden_ and delta_
  };
  std::vector<Lane> make_lanes(const UploadedBatch& batch) const;
  Status forward_layers(std::span<const Lane> lanes, const KvCache& cache, const LayerDone& on_layer_done);
  void begin_layer(const Lane& lane, int64_t layer, const KvCache& cache);
  Status attend(const Lane& lane, int64_t layer, const KvCache& cache);
  Status forward_without_rows();
  Status compute_logits(const UploadedBatch& batch);
  bool has_split_head() const;
  int64_t logit_cols() const;

  kernels::Ops& ops_;
  std::unique_ptr<kernels::Stream> stream_;
  ModelConfig config_;
  ModelInfo info_;
  std::unique_ptr<Attention> attention_;
  MlpLayers mlp_;
  ExpertExchange* exchange_ = nullptr;
  TensorExchange* tensor_ = nullptr;
  std::unique_ptr<kernels::Weight> embedding_;  // [V, H]
  std::unique_ptr<kernels::Weight> head_;       // [V, H]; null: the embedding
  std::vector<Norms> norms_;
  DeviceTensor final_norm_;

  std::unique_ptr<StepUploader> uploader_;
  DeviceTensor residual_;         // [T, H]: the sum of everything before the running half layer but its last part
  DeviceTensor hidden_;           // [T, H]: normed input of the running half layer
  DeviceTensor delta_;            // [T, H]: its output, not yet added to the residual
  DeviceTensor wanted_residual_;  // [wanted rows, H]
  DeviceTensor wanted_delta_;
  DeviceTensor wanted_hidden_;
  DeviceTensor logits_device_;  // [wanted rows, V]
  std::vector<float> logits_;
  size_t num_logits_ = 0;
};

}  // namespace tandem::model
