// MlpLayers as an ExpertStore: experts that move between ranks.
#include <algorithm>
#include <cstring>

#include "src/model/mlp.h"

namespace tandem::model {

void MlpLayers::keep_source(std::shared_ptr<const WeightSource> source, WeightFormats formats) {
  source_ = std::move(source);
  source_formats_ = std::move(formats);
}

MlpLayers::Layer& MlpLayers::moe_layer(int64_t index) {
  const auto found = std::find_if(layers_.begin(), layers_.end(),
                                  [index](const Layer& layer) { return layer.moe_index == index; });
  CHECK(found != layers_.end());
  return *found;
}

int64_t MlpLayers::num_slots() const { return num_moe_layers_ == 0 ? 0 : moe_layer(0).expert_gate_up->batch(); }

std::array<int64_t, 2> MlpLayers::slot_bytes(int64_t layer) const {
  const Layer& place = moe_layer(layer);
  return {place.expert_gate_up->matrix_bytes(), place.expert_down->matrix_bytes()};
}

std::string MlpLayers::layout() const {
  std::string text;
  for (const Layer& layer : layers_) {
    if (layer.moe_index < 0) continue;
    for (const kernels::Weight* weight : {layer.expert_gate_up.get(), layer.expert_down.get()}) {
      text += fmt::format("{}x{} {} scales {};", weight->n(), weight->k(), kernels::weight_format_name(weight->format()),
                          kernels::dtype_name(weight->scale_dtype()));
    }
  }
  return text;
}

ExpertMemory MlpLayers::slot(int64_t layer, int64_t slot) {
  const Layer& place = moe_layer(layer);
  return {place.expert_gate_up->matrix(slot), place.expert_down->matrix(slot)};
}

ExpertMemory MlpLayers::make_spare() {
  std::array<int64_t, 2> bytes{};
  for (int64_t layer = 0; layer < num_moe_layers_; ++layer) {
    const std::array<int64_t, 2> needed = slot_bytes(layer);
    for (size_t part = 0; part < 2; ++part) bytes[part] = std::max(bytes[part], needed[part]);
  }
  for (const int64_t part : bytes) {
    spares_.push_back(ops_.allocate(part));
    // So that its pages are there: who fills it, in pieces between steps, is not to wait for them.
    std::memset(spares_.back()->address(), 0, static_cast<size_t>(part));
  }
  return {spares_[spares_.size() - 2]->address(), spares_.back()->address()};
}

ExpertMemory MlpLayers::replace(int64_t layer, int64_t slot, const ExpertMemory& memory) {
  const Layer& place = moe_layer(layer);
  return {place.expert_gate_up->replace_matrix(slot, memory.gate_up),
          place.expert_down->replace_matrix(slot, memory.down)};
}

Status MlpLayers::reload(int64_t layer, int64_t slot, int32_t expert) {
  CHECK(source_ != nullptr);
  Layer& place = moe_layer(layer);
  WeightPlan plan(ops_, stream_, *source_, source_formats_);
  std::unique_ptr<kernels::Weight> gate_up;
  std::unique_ptr<kernels::Weight> down;
  list_experts(plan, place, std::span(&expert, 1), gate_up, down);
  TANDEM_TRY(plan.status());
  Sha256 ignored;
  const Result<LoadedWeights> loaded = plan.load(ignored, {});
  if (!loaded.ok()) return loaded.error();
  for (const auto& [from, to] : {std::pair(gate_up.get(), place.expert_gate_up.get()),
                                 std::pair(down.get(), place.expert_down.get())}) {
    if (from->matrix_bytes() != to->matrix_bytes() || from->scale_dtype() != to->scale_dtype()) {
      return make_error(ErrorKind::kUnsupported,
                        "expert {} of layer {} packs into {} bytes alone and {} beside its neighbours, so it cannot move",
                        expert, layer, from->matrix_bytes(), to->matrix_bytes());
    }
    std::memcpy(to->matrix(slot), from->matrix(0), static_cast<size_t>(to->matrix_bytes()));
  }
  return {};
}

}  // namespace tandem::model
