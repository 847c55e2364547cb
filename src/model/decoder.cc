#include "src/model/decoder.h"

#include <utility>

#include "src/kernels/shapes.h"

namespace tandem::model {

using kernels::DType;
using kernels::Tensor;

namespace {

int64_t bytes_per_token(const KvLayout& kv) {
  if (kv.kind == KvKind::kMla) return kernels::cached_latent_bytes(kv.dtype, kv.latent_dim, kv.rope_dim);
  return 2 * kv.kv_heads * kernels::cached_vector_bytes(kv.dtype, kv.head_dim);
}

}  // namespace

Decoder::Decoder(kernels::Ops& ops, ModelConfig config)
    : ops_(ops),
      stream_(ops.make_stream()),
      config_(std::move(config)),
      attention_(find_family(config_.architecture)->make_attention(ops, *stream_, config_)),
      mlp_(ops, *stream_, config_),
      norms_(static_cast<size_t>(config_.num_layers)) {}

void Decoder::list_weights(WeightPlan& plan) {
  const int64_t hidden = config_.hidden_size;
  plan.embedding(embedding_, "model.embed_tokens", config_.vocab_size, hidden);
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const std::string prefix = fmt::format("model.layers.{}.", layer);
    Norms& norms = norms_[static_cast<size_t>(layer)];
    plan.vector(norms.attention, prefix + "input_layernorm.weight", hidden);
    attention_->list_weights(plan, layer, prefix + "self_attn.");
    plan.vector(norms.mlp, prefix + "post_attention_layernorm.weight", hidden);
    mlp_.list_weights(plan, layer, prefix + "mlp.");
  }
  plan.vector(final_norm_, "model.norm.weight", hidden);
  if (!config_.tied_embeddings) {
    plan.head(head_, "lm_head", config_.vocab_size, hidden, has_split_head() ? Split::kRows : Split::kNone);
  }
}

KvLayout Decoder::make_kv_layout(int64_t block_size, DType kv_dtype) const {
  KvLayout kv = attention_->kv_layout();
  kv.num_layers = config_.num_layers;
  kv.block_size = block_size;
  kv.dtype = kv_dtype;
  kv.bytes_per_token = bytes_per_token(kv);
  return kv;
}

void Decoder::allocate(const Capacity& capacity, int64_t block_size, DType kv_dtype, ModelInfo info) {
  info_ = std::move(info);
  info_.kv = make_kv_layout(block_size, kv_dtype);
  info_.rows_depend_on_role = attention_->rows_depend_on_role();

  const StepLimits limits{capacity.rows, capacity.chunks, capacity.positions, config_.vocab_size, block_size};
  uploader_ = std::make_unique<StepUploader>(ops_, *stream_, limits);
  attention_->allocate(capacity);
  if (exchange_ != nullptr) exchange_->prepare(ops_, *stream_, exchange_shape(capacity));
  if (tensor_ != nullptr) tensor_->prepare(ops_, *stream_, tensor_shape(capacity));
  mlp_.allocate(capacity.rows);
  const DType dtype = ops_.activation_dtype();
  for (DeviceTensor* tensor : {&residual_, &hidden_, &delta_}) {
    *tensor = DeviceTensor(ops_, dtype, capacity.rows, config_.hidden_size);
  }
  for (DeviceTensor* tensor : {&wanted_residual_, &wanted_delta_, &wanted_hidden_}) {
    *tensor = DeviceTensor(ops_, dtype, capacity.chunks, config_.hidden_size);
  }
  const int64_t cols = config_.tensor.rank == 0 ? config_.vocab_size : logit_cols();
  logits_device_ = DeviceTensor(ops_, DType::kF32, capacity.chunks, cols);
}

ExchangeShape Decoder::exchange_shape(const Capacity& capacity) const {
  ExchangeShape shape;
  shape.max_rows = (capacity.rows + config_.tensor.size - 1) / config_.tensor.size;
  shape.hidden = config_.hidden_size;
  shape.top_k = config_.moe.router.top_k;
  shape.num_experts = config_.moe.num_experts;
  shape.formats = mlp_.expert_formats();
  return shape;
}

TensorShape Decoder::tensor_shape(const Capacity& capacity) const {
  return {capacity.rows, config_.hidden_size, capacity.chunks, has_split_head() ? logit_cols() : 0};
}

// A head that is the embedding, or has a size that the ranks cannot share, belongs to rank 0.
bool Decoder::has_split_head() const {
  return config_.tensor.size > 1 && !config_.tied_embeddings && config_.vocab_size % config_.tensor.size == 0;
}

int64_t Decoder::logit_cols() const { return has_split_head() ? config_.vocab_size / config_.tensor.size : config_.vocab_size; }

Status Decoder::forward(const Batch& batch, KvCache& cache, const LayerDone& on_layer_done) {
  CHECK(cache.layout() == info_.kv);
  CHECK(!cache.is_part() || tensor_ != nullptr);
  num_logits_ = 0;
  if (batch.tokens.empty()) return forward_without_rows();
  const UploadedBatch uploaded = uploader_->upload(batch, cache);
  mlp_.begin_step(batch);
  TANDEM_TRY(forward_layers(make_lanes(uploaded), cache, on_layer_done));
  if (!batch.logit_rows.empty()) TANDEM_TRY(compute_logits(uploaded));
  ops_.synchronize(*stream_);
  mlp_.read_routing(uploaded.rows);
  return {};
}

// The other ranks have rows: their experts are here.
Status Decoder::forward_without_rows() {
  mlp_.read_routing(0);
  if (exchange_ == nullptr) return {};
  const MlpRows none{0, 0, hidden_.rows(0), delta_.rows(0)};
  for (const int64_t layer : info_.moe_layers) {
    TANDEM_TRY(mlp_.send(layer, none));
    TANDEM_TRY(mlp_.compute(layer, none));
    TANDEM_TRY(mlp_.finish(layer, none));
  }
  ops_.synchronize(*stream_);
  return {};
}

std::vector<Decoder::Lane> Decoder::make_lanes(const UploadedBatch& batch) const {
  std::vector<Lane> lanes;
  for (const Step& step : batch.parts) {
    const auto rows_of = [&step](const DeviceTensor& all) { return all.all().row_slice(step.first_row, step.rows); };
    const int index = static_cast<int>(lanes.size());
    lanes.push_back({&step, rows_of(residual_), {index, step.first_row, rows_of(hidden_), rows_of(delta_)}});
  }
  return lanes;
}

// Two lanes go through a layer one behind the other, so that whatever one of them waits for travels while the other one
// computes: its rows during the other's attention or experts, its outputs during the other's experts or the next
// attention. All ranks go in this order. With one lane it is the plain order of a decoder.
//
// The first lane writes its keys and values of a layer before the second one reads any, so a sequence may be in both.
//
// In a cache of which this rank has a part, a layer's KV is there only when the other tensor ranks have written theirs.
// They do so before their summands of the same layer's attention, and sum() waits for those of all of them: so behind the
// last lane's sum the layer is whole.
Status Decoder::forward_layers(std::span<const Lane> lanes, const KvCache& cache, const LayerDone& on_layer_done) {
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    for (const Lane& lane : lanes) {
      if (layer > 0) TANDEM_TRY(mlp_.finish(layer - 1, lane.mlp));
      const bool tells = on_layer_done && &lane == &lanes.back();
      begin_layer(lane, layer, cache);
      if (tells && !cache.is_part()) {
        ops_.synchronize(*stream_);
        on_layer_done(static_cast<int>(layer));
      }
      TANDEM_TRY(attend(lane, layer, cache));
      if (tells && cache.is_part()) on_layer_done(static_cast<int>(layer));
      TANDEM_TRY(mlp_.send(layer, lane.mlp));
    }
    for (const Lane& lane : lanes) TANDEM_TRY(mlp_.compute(layer, lane.mlp));
  }
  for (const Lane& lane : lanes) TANDEM_TRY(mlp_.finish(config_.num_layers - 1, lane.mlp));
  return {};
}

// Until the layer's keys and values are in the cache.
void Decoder::begin_layer(const Lane& lane, int64_t layer, const KvCache& cache) {
  const float eps = config_.rms_norm_eps;
  const Norms& norms = norms_[static_cast<size_t>(layer)];
  if (layer == 0) {
    ops_.embed(*stream_, *embedding_, lane.step->tokens, lane.residual);
    ops_.rms_norm(*stream_, lane.residual, norms.attention.all(), eps, lane.mlp.hidden);
  } else {
    ops_.add_rms_norm(*stream_, lane.residual, lane.mlp.out, norms.attention.all(), eps, lane.mlp.hidden);
  }
  attention_->write_kv(*lane.step, layer, lane.mlp.hidden, cache.layer(layer));
}

// Until the MLP's input is in `hidden`.
Status Decoder::attend(const Lane& lane, int64_t layer, const KvCache& cache) {
  attention_->attend(*lane.step, layer, cache.layer(layer), lane.mlp.out);
  if (tensor_ != nullptr) TANDEM_TRY(tensor_->sum(lane.mlp.out));
  ops_.add_rms_norm(*stream_, lane.residual, lane.mlp.out, norms_[static_cast<size_t>(layer)].mlp.all(),
                    config_.rms_norm_eps, lane.mlp.hidden);
  return {};
}

// The last sum and norm, and the head, for the wanted rows alone.
Status Decoder::compute_logits(const UploadedBatch& batch) {
  const int64_t wanted = batch.logit_rows.rows;
  const bool is_first = config_.tensor.rank == 0;
  if (!is_first && !has_split_head()) return {};
  const Tensor hidden = wanted_hidden_.rows(wanted);
  ops_.gather_rows(*stream_, residual_.rows(batch.rows), batch.logit_rows, wanted_residual_.rows(wanted));
  ops_.gather_rows(*stream_, delta_.rows(batch.rows), batch.logit_rows, wanted_delta_.rows(wanted));
  ops_.add_rms_norm(*stream_, wanted_residual_.rows(wanted), wanted_delta_.rows(wanted), final_norm_.all(),
                    config_.rms_norm_eps, hidden);
  const Tensor logits = logits_device_.rows(wanted);
  ops_.linear(*stream_, hidden, head_ == nullptr ? *embedding_ : *head_, logits.col_slice(0, logit_cols()));
  if (has_split_head()) TANDEM_TRY(tensor_->gather_columns(logits));
  if (!is_first) return {};
  num_logits_ = static_cast<size_t>(wanted);
  logits_.resize(num_logits_ * static_cast<size_t>(config_.vocab_size));
  ops_.read_back(*stream_, logits_device_.all().address, std::as_writable_bytes(std::span(logits_)));
  return {};
}

std::span<const float> Decoder::logits(size_t index) const {
  CHECK_LT(index, num_logits_);
  const size_t vocab = static_cast<size_t>(config_.vocab_size);
  return std::span<const float>(logits_).subspan(index * vocab, vocab);
}

}  // namespace tandem::model
