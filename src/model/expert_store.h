// The routed experts that a model holds, as memory that can be copied to other ranks and put in the place of others:
// what moving experts needs to know of a model. MlpLayers implements it.
//
// An expert is two packed matrices (gate and up, down) with all that belongs to them, scales included. Slot i of a layer
// is local expert i. Layers are counted among those with routed experts.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "src/base/result.h"

namespace tandem::model {

// Memory of one expert; parts are those of slot_bytes().
struct ExpertMemory {
  std::byte* gate_up = nullptr;
  std::byte* down = nullptr;
};

class ExpertStore {
 public:
  virtual ~ExpertStore() = default;

  virtual int64_t num_layers() const = 0;
  virtual int64_t num_slots() const = 0;  // of each layer
  // Bytes of an expert's two parts. 0 where the device's weights cannot be moved.
  virtual std::array<int64_t, 2> slot_bytes(int64_t layer) const = 0;
  // Names the layout of every layer: experts may be copied between ranks that say the same.
  virtual std::string layout() const = 0;
  virtual ExpertMemory slot(int64_t layer, int64_t slot) = 0;
  // New memory for an expert of any layer; lives as long as the store.
  virtual ExpertMemory make_spare() = 0;
  // The slot's expert lies in `memory` from now on; returns where it lay, which is spare. Between steps only.
  virtual ExpertMemory replace(int64_t layer, int64_t slot, const ExpertMemory& memory) = 0;
  // Reads expert `expert` of the model from where the weights came from, into the slot. Slow; between steps only.
  virtual Status reload(int64_t layer, int64_t slot, int32_t expert) = 0;
};

}  // namespace tandem::model
