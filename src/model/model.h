// A loaded model: turns a Batch into logits, writing KV on the way. decoder.cc implements it on top of the operation
// table; what differs between families is in one short file each (family.h; deepseek_v3.cc, qwen3_moe.cc).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/kernels/ops.h"
#include "src/model/batch.h"
#include "src/model/expert_exchange.h"
#include "src/model/expert_store.h"
#include "src/model/kv_cache.h"
#include "src/model/quantization.h"
#include "src/model/routing_simulation.h"
#include "src/model/tensor_exchange.h"

namespace tandem::model {

struct MemoryNeeds;  // memory_needs.h

enum class ComputeType : uint8_t { kBf16, kF32 };            // of weights; sums are f32 in both
enum class KvCacheType : uint8_t { kAuto, kBf16, kF8E4M3 };  // kAuto: the type of the weights
enum class LoadFormat : uint8_t { kSafetensors, kDummy };

struct LoadOptions {
  std::string path;  // model directory, or (with kDummy) a directory or file holding config.json
  LoadFormat format = LoadFormat::kSafetensors;
  ComputeType compute = ComputeType::kBf16;
  QuantizationRequest quantization;
  KvCacheType kv_cache = KvCacheType::kAuto;
  int64_t max_num_batched_tokens = 0;  // rows of the largest Batch
  int64_t max_num_seqs = 0;            // chunks, and logit rows, of the largest Batch
  int64_t max_model_len = 0;           // 0: the config's max_position_embeddings
  int64_t block_size = 16;
  uint64_t dummy_seed = 0;
  // Null: this rank has all experts. Else those of its shard are loaded; must outlive the model.
  ExpertExchange* exchange = nullptr;
  // Null: this rank has whole layers. Else its share of heads and dense widths is loaded; must outlive the model.
  TensorExchange* tensor = nullptr;
  bool moves_experts = false;    // for Model::expert_store: the files stay open
  bool keep_routing = false;     // for Model::routed_experts
  RoutingSimulation simulation;  // instead of the routers' choices
  // Called before any weight is read; an error ends the load. May be empty.
  std::function<Status(const MemoryNeeds&)> on_sized;
  std::function<void(double fraction)> on_progress;  // 0 … 1 while weights load; may be empty
};

struct ModelInfo {
  std::string architecture;   // "DeepseekV3ForCausalLM"
  int64_t vocab_size = 0;     // rows of the output head
  int64_t max_model_len = 0;  // positions
  int64_t weight_bytes = 0;   // packed, resident
  int64_t expert_bytes = 0;   // of these, in routed experts
  int64_t lookup_bytes = 0;   // of these, in tables of which a step reads single rows (an embedding that is not tied)
  int64_t num_parameters = 0;
  std::vector<int64_t> moe_layers;  // indices of the layers with routed experts
  int64_t num_experts = 0;          // of each of them
  int64_t experts_per_token = 0;
  KvLayout kv;
  // Rows of prompt tokens and of generated tokens are computed by different forms (MLA), so KV of generated tokens
  // must not serve another request's prompt.
  bool rows_depend_on_role = false;
  // SHA-256 hex over config, weight formats, and tensor names, shapes and sampled bytes: same on both sides of a
  // transfer.
  std::string fingerprint;
};

class Model {
 public:
  virtual ~Model() = default;
  virtual const ModelInfo& info() const = 0;

  // Computes every row of `batch`; afterwards logits(i) is row i of batch.logit_rows. `on_layer_done` may be empty.
  // With an ExpertExchange or a TensorExchange all ranks call it together, those without rows too; a fault is that of the lost group, and
  // what the step wrote to the cache is void then.
  virtual Status forward(const Batch& batch, KvCache& cache, const LayerDone& on_layer_done) = 0;

  // f32 logits [vocab_size] of the i-th wanted row of the last forward, in host memory; valid until the next. Only at
  // the first of the tensor ranks.
  virtual std::span<const float> logits(size_t index) const = 0;

  // With LoadOptions::keep_routing: the experts that each row of the last forward was routed to in the `index`-th of
  // ModelInfo::moe_layers, [rows, experts_per_token]; valid until the next.
  virtual std::span<const int32_t> routed_experts(int64_t /*index*/) const { return {}; }

  // With LoadOptions::moves_experts: the experts that are here. Null without routed experts.
  virtual ExpertStore* expert_store() { return nullptr; }
};

// Reads and checks config.json and every tensor header before any weight is used; a fault names file, value and remedy.
Result<std::unique_ptr<Model>> load_model(kernels::Ops& ops, const LoadOptions& options);

}  // namespace tandem::model
