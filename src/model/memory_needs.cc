#include "src/model/memory_needs.h"

#include <algorithm>

namespace tandem::model {
namespace {

// Of a matrix [n, k]; `scale_bytes` of a group, with its zero.
int64_t packed_bytes(const kernels::WeightFormat& format, int64_t n, int64_t k, int64_t scale_bytes) {
  const int64_t elements = n * k;
  const int64_t group = format.group_size == 0 ? k : format.group_size;
  const int64_t scales = n * ((k + group - 1) / group) * scale_bytes;
  switch (format.type) {
    case kernels::WeightType::kF32:
      return 4 * elements;
    case kernels::WeightType::kBf16:
      return 2 * elements;
    case kernels::WeightType::kInt8:
      return elements + scales;
    case kernels::WeightType::kInt4:
      return elements / 2 + scales;
  }
  return 4 * elements;
}

constexpr int64_t kStoredScaleBytes = 5;  // f32, and a zero

// What is quantised in groups while it is loaded has scales of 16 bits.
int64_t scale_bytes(const WeightSource& source, const WeightPlan::Task& task, const MatrixRef& ref) {
  if (!task.format.is_integer() || source.integer_format(ref).has_value()) return kStoredScaleBytes;
  return task.format.group_size == 0 ? 4 : 2;
}

// What loading a weight holds besides its packed form: its integers, or its values where they cannot be used in place.
int64_t staging_bytes(const WeightSource& source, const WeightPlan::Task& task) {
  const bool has_views =
      std::all_of(task.refs.begin(), task.refs.end(), [&](const MatrixRef& ref) { return source.has_view(ref); });
  const bool is_in_place = !task.format.is_integer() && has_views && task.parts == 1 && !task.must_be_dense;
  if (is_in_place && task.kept.is_all()) return 0;
  int64_t bytes = 0;
  for (const MatrixRef& ref : task.refs) {
    const bool is_bf16 = task.format.type == kernels::WeightType::kBf16;
    bytes += task.format.is_integer() ? packed_bytes(task.format, ref.n, ref.k, kStoredScaleBytes)
                                      : (is_bf16 ? 2 : 4) * ref.n * ref.k;
  }
  if (!task.kept.is_all()) bytes += task.kept.share_of(bytes);  // cut out of them
  return bytes;
}

}  // namespace

void count_weights(const WeightPlan& plan, MemoryNeeds& needs) {
  needs.weight_bytes = 0;
  needs.expert_bytes = 0;
  needs.staging_bytes = 0;
  for (const WeightPlan::Task& task : plan.tasks()) {
    needs.weight_bytes += 4 * task.n;  // a vector
    int64_t bytes = 0;
    for (const MatrixRef& ref : task.refs) {
      bytes += task.kept.share_of(packed_bytes(task.format, ref.n, ref.k, scale_bytes(plan.source(), task, ref)));
    }
    needs.weight_bytes += bytes;
    // A batch of matrices, or one of it.
    const bool is_of_experts = std::ssize(task.refs) > task.parts || !task.identity.empty();
    if (is_of_experts) needs.expert_bytes += bytes;
    needs.staging_bytes = std::max(needs.staging_bytes, staging_bytes(plan.source(), task));
  }
}

int64_t workspace_bytes(const ModelConfig& config, const Capacity& capacity, bool keep_routing) {
  constexpr int64_t kFloatBytes = 4;
  const MlaConfig& mla = config.mla;
  const int64_t head_dim =
      std::max(config.gqa.head_dim, mla.nope_dim + mla.rope_dim + mla.value_dim + 2 * mla.kv_lora_rank);
  const int64_t attention = 4 * config.num_heads * head_dim + mla.q_lora_rank + mla.kv_lora_rank + mla.rope_dim;
  const int64_t dense = 3 * std::max(config.dense_width, config.moe.shared_width);
  const int64_t experts =
      config.moe.num_experts + config.moe.router.top_k * (config.hidden_size + 3 * config.moe.expert_width);
  const int64_t per_row = 6 * config.hidden_size + attention + dense + (config.moe.num_experts > 0 ? experts : 0);
  const int64_t logits = 2 * capacity.chunks * config.vocab_size;  // on the device and on the host
  const int64_t rope = capacity.positions * std::max(config.gqa.head_dim, mla.rope_dim);
  // On the device and on the host.
  const int64_t routing = keep_routing ? 2 * capacity.rows * config.moe.router.top_k * config.num_layers : 0;
  return kFloatBytes * (capacity.rows * per_row + logits + rope + routing);
}

}  // namespace tandem::model
