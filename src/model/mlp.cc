#include "src/model/mlp.h"

#include <algorithm>
#include <numeric>

namespace tandem::model {

using kernels::DType;
using kernels::Tensor;

MlpLayers::MlpLayers(kernels::Ops& ops, kernels::Stream& stream, const ModelConfig& config)
    : ops_(ops), stream_(stream), config_(config), layers_(static_cast<size_t>(config.num_layers)) {
  for (size_t l = 0; l < layers_.size(); ++l) {
    if (config.layer_is_moe[l]) layers_[l].moe_index = num_moe_layers_++;
  }
}

void MlpLayers::list_weights(WeightPlan& plan, int64_t index, const std::string& prefix) {
  Layer& layer = layers_[static_cast<size_t>(index)];
  const MoeConfig& moe = config_.moe;
  if (!config_.layer_is_moe[static_cast<size_t>(index)]) {
    list_dense(plan, layer.dense, config_.dense_width, prefix);
    return;
  }
  plan.router(layer.router, prefix + "gate", moe.num_experts, config_.hidden_size);
  if (moe.has_correction_bias) {
    plan.vector(layer.correction_bias, prefix + "gate.e_score_correction_bias", moe.num_experts);
  }
  layer.expert_prefix = prefix + "experts.";
  list_experts(plan, layer);
  if (moe.shared_width > 0) list_dense(plan, layer.dense, moe.shared_width, prefix + "shared_experts.");
}

void MlpLayers::list_dense(WeightPlan& plan, Dense& dense, int64_t width, const std::string& prefix) {
  const int64_t hidden = config_.hidden_size;
  const int64_t whole = config_.tensor.size * width;
  dense.width = width;
  plan.batched(dense.gate_up,
               {{prefix + "gate_proj.weight", whole, hidden}, {prefix + "up_proj.weight", whole, hidden}}, 2, Split::kRows);
  plan.linear(dense.down, prefix + "down_proj", hidden, whole, Split::kColumns);
}

void MlpLayers::list_experts(WeightPlan& plan, Layer& layer) const {
  std::vector<int32_t> chosen;
  if (exchange_ != nullptr) {
    chosen = exchange_->shard().slots;
  } else {
    chosen.resize(static_cast<size_t>(config_.moe.num_experts));
    std::iota(chosen.begin(), chosen.end(), 0);
  }
  list_experts(plan, layer, chosen, layer.expert_gate_up, layer.expert_down);
  layer.expert_format = plan.tasks()[plan.tasks().size() - 2].format;
}

// Experts lie either one by one, or stacked as gate_up_proj [E, 2 I, H] and down_proj [E, H, I].
void MlpLayers::list_experts(WeightPlan& plan, const Layer& layer, std::span<const int32_t> chosen,
                             std::unique_ptr<kernels::Weight>& gate_up, std::unique_ptr<kernels::Weight>& down) const {
  const std::string& prefix = layer.expert_prefix;
  const int64_t hidden = config_.hidden_size;
  const int64_t width = config_.moe.expert_width;
  const int64_t experts = config_.moe.num_experts;
  const bool is_stacked = plan.source().has(prefix + "gate_up_proj");
  std::vector<MatrixRef> gate_up_refs;
  std::vector<MatrixRef> down_refs;
  for (int64_t e = 0; e < experts; ++e) {
    if (is_stacked) {
      gate_up_refs.push_back({prefix + "gate_up_proj", 2 * width, hidden, e, experts});
      down_refs.push_back({prefix + "down_proj", hidden, width, e, experts});
    } else {
      const std::string expert = prefix + std::to_string(e);
      gate_up_refs.push_back({expert + ".gate_proj.weight", width, hidden});
      gate_up_refs.push_back({expert + ".up_proj.weight", width, hidden});
      down_refs.push_back({expert + ".down_proj.weight", hidden, width});
    }
  }
  plan.batched_subset(gate_up, std::move(gate_up_refs), is_stacked ? 1 : 2, chosen);
  plan.batched_subset(down, std::move(down_refs), 1, chosen);
}

void MlpLayers::allocate(int64_t max_rows) {
  const DType dtype = ops_.activation_dtype();
  const int64_t hidden = config_.hidden_size;
  int64_t width = 0;
  for (const Layer& layer : layers_) width = std::max(width, layer.dense.width);
  gate_up_ = DeviceTensor(ops_, dtype, max_rows, 2 * width);
  activated_ = DeviceTensor(ops_, dtype, max_rows, width);
  const std::vector<bool>& is_moe = config_.layer_is_moe;
  if (std::find(is_moe.begin(), is_moe.end(), true) == is_moe.end()) return;
  const int64_t experts = config_.moe.num_experts;
  const int64_t top_k = config_.moe.router.top_k;
  router_logits_ = DeviceTensor(ops_, DType::kF32, max_rows, experts);
  expert_ids_ = DeviceTensor(ops_, DType::kI32, max_rows * (keeps_routing_ ? num_moe_layers_ : 1), top_k);
  expert_weights_ = DeviceTensor(ops_, DType::kF32, max_rows, top_k);
  shared_out_ = DeviceTensor(ops_, dtype, max_rows, hidden);
  if (exchange_ != nullptr) return;
  order_ = DeviceTensor(ops_, DType::kI32, max_rows * top_k, 1);
  offsets_ = DeviceTensor(ops_, DType::kI32, experts + 1, 1);
  expert_out_ = DeviceTensor(ops_, dtype, max_rows * top_k, hidden);
}

void MlpLayers::set_routing(bool is_kept, const RoutingSimulation& simulation) {
  if (num_moe_layers_ == 0) return;
  keeps_routing_ = is_kept;
  if (!simulation.is_on()) return;
  simulated_.emplace(simulation, num_moe_layers_, config_.moe.num_experts, config_.moe.router.top_k);
}

void MlpLayers::begin_step(const Batch& batch) {
  if (!simulated_) return;
  const size_t top_k = static_cast<size_t>(config_.moe.router.top_k);
  const size_t rows = batch.tokens.size();
  simulated_ids_.resize(static_cast<size_t>(num_moe_layers_) * rows * top_k);
  simulated_weights_.assign(rows * top_k, config_.moe.router.scale / static_cast<float>(top_k));
  for (const Chunk& chunk : batch.chunks) {
    for (int32_t i = 0; i < chunk.num_rows; ++i) {
      const size_t row = static_cast<size_t>(chunk.first_row + i);
      const SimulatedRouter::Row key{chunk.first_position + i, batch.tokens[row], chunk.is_prompt};
      for (size_t l = 0; l < static_cast<size_t>(num_moe_layers_); ++l) {
        simulated_->choose(static_cast<int64_t>(l), key,
                           std::span(simulated_ids_).subspan((l * rows + row) * top_k, top_k));
      }
    }
  }
}

void MlpLayers::read_routing(int64_t rows) {
  if (!keeps_routing_) return;
  kept_rows_ = rows;
  const size_t count = static_cast<size_t>(rows * config_.moe.router.top_k);
  kept_routing_.resize(static_cast<size_t>(num_moe_layers_) * count);
  for (const Layer& layer : layers_) {
    if (layer.moe_index < 0) continue;
    const std::span<int32_t> kept =
        std::span(kept_routing_).subspan(static_cast<size_t>(layer.moe_index) * count, count);
    ops_.read_back(stream_, expert_ids(layer, 0, rows).address, std::as_writable_bytes(kept));
  }
}

std::span<const int32_t> MlpLayers::routed_experts(int64_t index) const {
  if (!keeps_routing_) return {};
  CHECK_LT(index, num_moe_layers_);
  const size_t count = static_cast<size_t>(kept_rows_ * config_.moe.router.top_k);
  return std::span(kept_routing_).subspan(static_cast<size_t>(index) * count, count);
}

Tensor MlpLayers::expert_ids(const Layer& layer, int64_t first_row, int64_t rows) const {
  if (!keeps_routing_) return expert_ids_.all().row_slice(first_row, rows);
  const int64_t max_rows = expert_ids_.all().rows / num_moe_layers_;
  return expert_ids_.all().row_slice(layer.moe_index * max_rows + first_row, rows);
}

// The real router has run already: a benchmark shall pay for it.
void MlpLayers::simulate_routing(const Layer& layer, int64_t first_row, const Tensor& ids, const Tensor& weights) {
  const size_t count = static_cast<size_t>(ids.rows * ids.cols);
  const size_t first = static_cast<size_t>(first_row * ids.cols);
  const size_t of_layer = simulated_weights_.size();
  const std::span<const int32_t> chosen =
      std::span<const int32_t>(simulated_ids_).subspan(static_cast<size_t>(layer.moe_index) * of_layer + first, count);
  ops_.upload(stream_, ids.address, std::as_bytes(chosen));
  ops_.upload(stream_, weights.address, std::as_bytes(std::span(simulated_weights_).subspan(first, count)));
}

// Of a part's rows those that this rank asks experts for.
RowRange MlpLayers::own_rows(const MlpRows& part) const {
  const int64_t rows = part.hidden.rows;
  return tensor_ == nullptr ? RowRange{0, rows} : tensor_->own_rows(rows);
}

Status MlpLayers::send(int64_t index, const MlpRows& part) {
  const Layer& layer = layers_[static_cast<size_t>(index)];
  if (layer.router == nullptr) return {};
  const RowRange own = own_rows(part);
  const Tensor hidden = part.hidden.row_slice(own.first, own.count);
  // Routing that is kept is that of all rows.
  if (keeps_routing_) {
    route(layer, part.first_row, part.hidden);
  } else {
    route(layer, part.first_row + own.first, hidden);
  }
  if (exchange_ == nullptr) return {};
  const Tensor ids = expert_ids(layer, part.first_row + own.first, own.count);
  return exchange_->lane(part.lane).dispatch(layer.moe_index, hidden, ids);
}

// Chooses the experts of `hidden`, which begins at row `first_row` of the step.
void MlpLayers::route(const Layer& layer, int64_t first_row, const Tensor& hidden) {
  if (hidden.rows == 0) return;
  const Tensor logits = router_logits_.rows(hidden.rows);
  const Tensor ids = expert_ids(layer, first_row, hidden.rows);
  const Tensor weights = expert_weights_.all().row_slice(first_row, hidden.rows);
  ops_.linear(stream_, hidden, *layer.router, logits);
  ops_.route(stream_, logits, layer.correction_bias.all(), config_.moe.router, ids, weights);
  if (simulated_) simulate_routing(layer, first_row, ids, weights);
}

Status MlpLayers::compute(int64_t index, const MlpRows& part) {
  const Layer& layer = layers_[static_cast<size_t>(index)];
  if (layer.router == nullptr) return {};
  if (exchange_ != nullptr) return compute_arrived(layer, exchange_->lane(part.lane));
  compute_own_experts(layer, part);
  return {};
}

// All experts are here.
void MlpLayers::compute_own_experts(const Layer& layer, const MlpRows& part) {
  const RowRange own = own_rows(part);
  const Tensor ids = expert_ids(layer, part.first_row + own.first, own.count);
  const Tensor order = order_.rows(ids.rows * ids.cols);
  ops_.sort_by_expert(stream_, ids, config_.moe.num_experts, order, offsets_.all());
  ops_.expert_mlp(stream_, part.hidden.row_slice(own.first, own.count), order, offsets_.all(), ids.cols,
                  *layer.expert_gate_up, *layer.expert_down, own_outputs(part));
}

Tensor MlpLayers::own_outputs(const MlpRows& part) const {
  const RowRange own = own_rows(part);
  const int64_t top_k = config_.moe.router.top_k;
  return expert_out_.all().row_slice((part.first_row + own.first) * top_k, own.count * top_k);
}

// Slots of all ranks' rows whose experts are here.
Status MlpLayers::compute_arrived(const Layer& layer, ExpertExchange& exchange) {
  while (true) {
    TANDEM_ASSIGN(const ReceivedSlots received, exchange.receive());
    if (received.count == 0) return {};
    ops_.expert_mlp_encoded(stream_, received.rows, received.order, received.offsets, config_.moe.router.top_k,
                            *layer.expert_gate_up, *layer.expert_down, received.out, received.targets);
    TANDEM_TRY(exchange.give_back());
  }
}

Status MlpLayers::finish(int64_t index, const MlpRows& part) {
  const Layer& layer = layers_[static_cast<size_t>(index)];
  const int64_t rows = part.hidden.rows;
  if (layer.router == nullptr) {
    if (rows == 0) return {};
    forward_dense(layer.dense, part.hidden, part.out);
    return tensor_ == nullptr ? Status() : tensor_->sum(part.out);
  }
  // Shared experts first: outputs of the others may still be on their way.
  const bool has_shared = layer.dense.width > 0 && rows > 0;
  const Tensor shared_out = shared_out_.rows(rows);
  if (has_shared) {
    forward_dense(layer.dense, part.hidden, shared_out);
    if (tensor_ != nullptr) TANDEM_TRY(tensor_->reduce(shared_out));
  }
  Tensor outputs;
  if (exchange_ == nullptr) {
    outputs = own_outputs(part);
  } else {
    TANDEM_ASSIGN(outputs, exchange_->lane(part.lane).collect());
  }
  const RowRange own = own_rows(part);
  if (own.count > 0) {
    const Tensor out = part.out.row_slice(own.first, own.count);
    ops_.combine(stream_, outputs, expert_weights_.all().row_slice(part.first_row + own.first, own.count), out);
    if (has_shared) ops_.add(stream_, out, shared_out.row_slice(own.first, own.count));
  }
  return tensor_ == nullptr || rows == 0 ? Status() : tensor_->share(part.out);
}

void MlpLayers::forward_dense(const Dense& dense, const Tensor& hidden, const Tensor& out) {
  const Tensor gate_up = gate_up_.rows(hidden.rows).col_slice(0, 2 * dense.width);
  const Tensor activated = activated_.rows(hidden.rows).col_slice(0, dense.width);
  ops_.linear(stream_, hidden, *dense.gate_up, gate_up);
  ops_.silu_mul(stream_, gate_up, activated);
  ops_.linear(stream_, activated, *dense.down, out);
}

std::vector<kernels::WeightFormat> MlpLayers::expert_formats() const {
  std::vector<kernels::WeightFormat> formats;
  for (const Layer& layer : layers_) {
    if (layer.router != nullptr) formats.push_back(layer.expert_format);
  }
  return formats;
}

}  // namespace tandem::model
