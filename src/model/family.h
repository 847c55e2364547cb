// A model family is one entry of the table in family.cc and one file: how it reads its config.json, and its attention.
// Everything else (embedding, norms, MLPs, experts, head) is shared, in decoder.cc and mlp.cc.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "src/kernels/ops.h"
#include "src/model/config.h"
#include "src/model/kv_cache.h"
#include "src/model/step.h"
#include "src/model/weights.h"

namespace tandem::model {

// The largest step that a model computes.
struct Capacity {
  int64_t rows = 0;       // of a step
  int64_t chunks = 0;     // of a step; also rows whose logits are wanted
  int64_t positions = 0;  // of a sequence
};

// The attention of all layers of one model; owns their weights and its scratch memory. Built in this order:
// construction, list_weights for every layer, allocate.
class Attention {
 public:
  virtual ~Attention() = default;
  // Kind and dimensions; the caller fills in layers, block size, dtype and bytes.
  virtual KvLayout kv_layout() const = 0;
  // Whether prompt rows and generated rows are computed by different formulas (batch.h).
  virtual bool rows_depend_on_role() const = 0;
  // Lists the tensors of layer `layer`, whose names begin with `prefix` ("model.layers.3.self_attn.").
  virtual void list_weights(WeightPlan& plan, int64_t layer, const std::string& prefix) = 0;
  virtual void allocate(const Capacity& capacity) = 0;

  // First half: projects hidden [T, H] to queries (kept inside) and writes the KV of all rows to the cache.
  virtual void write_kv(const Step& step, int64_t layer, const kernels::Tensor& hidden,
                        const kernels::KvLayerView& cache) = 0;
  // Second half: attention of the kept queries over the cache, and the output projection to out [T, H].
  virtual void attend(const Step& step, int64_t layer, const kernels::KvLayerView& cache,
                      const kernels::Tensor& out) = 0;
};

struct Family {
  std::string_view architecture;  // in config.json's "architectures"
  void (*read_config)(JsonFields& json, ModelConfig& config);
  std::unique_ptr<Attention> (*make_attention)(kernels::Ops& ops, kernels::Stream& stream, const ModelConfig& config);
};

extern const Family kDeepseekV3;  // deepseek_v3.cc
extern const Family kQwen3Moe;    // qwen3_moe.cc

std::span<const Family* const> families();
// Null if there is no such family.
const Family* find_family(std::string_view architecture);

}  // namespace tandem::model
