// Where the experts of a model are, when they are spread over the ranks of a group: what MlpLayers needs to know of it.
// src/ep implements it.
//
// One MoE layer of one step, on every rank of the group, also on those without rows:
//
//   dispatch(hidden, ids)                  rows travel to the ranks that hold their experts
//   while (receive() has slots) {          what this rank's experts have to compute, its own rows included
//     Ops::expert_mlp_encoded(…)           writes each output where its owner wants it
//     give_back()
//   }
//   collect()                              the outputs of this rank's rows, slot by slot
//
// A second lane is a second exchange beside it, of other rows of the same step: all ranks then call dispatch of both, then
// receive and give_back of both, then collect of both, each in the order of the lanes.
//
// A token's outputs come back one by one and are summed by the rank that owns the token, in the order of its slots. So
// the sum has one order, whatever the placement, and the bits are those of one rank that has all experts.
#pragma once

#include <cstdint>
#include <vector>

#include "src/base/result.h"
#include "src/kernels/ops.h"
#include "src/kernels/tensor.h"

namespace tandem::model {

// Which experts this rank holds: local index i is expert slots[i] of the layer. The same in all layers at start.
struct ExpertShard {
  int32_t rank = 0;
  int32_t num_ranks = 1;
  std::vector<int32_t> slots;  // ascending unless moved; 1 … num_experts of them
};

// Slots to be computed here: the operands of Ops::expert_mlp_encoded.
struct ReceivedSlots {
  int64_t count = 0;          // 0: none are left
  kernels::EncodedRows rows;  // those that `order` names have arrived
  kernels::Tensor order;      // I32 [count, 1]: row * top_k + j, grouped by local expert
  kernels::Tensor offsets;    // I32 [local experts + 1, 1]
  float* out = nullptr;
  kernels::Tensor targets;  // I64 [count, 1]
};

struct ExchangeShape {
  int64_t max_rows = 0;  // of a step of one rank; the same on all ranks
  int64_t hidden = 0;
  int64_t top_k = 0;
  int64_t num_experts = 0;
  // Of the experts' gate_up in each layer that has routed ones: rows travel as it takes them.
  std::vector<kernels::WeightFormat> formats;
};

class ExpertExchange {
 public:
  virtual ~ExpertExchange() = default;

  virtual const ExpertShard& shard() const = 0;
  // 0, which is this one, or 1 if it has a second one. That takes the second part of a step, at most half of its rows.
  virtual ExpertExchange& lane(int index) = 0;
  // What it will take of this rank's memory, beside what a rank that has all experts takes.
  virtual int64_t extra_bytes(const kernels::Ops& ops, const ExchangeShape& shape) const = 0;
  // Allocates; once, before the first dispatch.
  virtual void prepare(kernels::Ops& ops, kernels::Stream& stream, const ExchangeShape& shape) = 0;

  // Errors of the calls below are those of a lost group: kUnavailable, naming the rank. The step is void then.

  // hidden [T, H] and ids I32 [T, k] of the `layer`-th MoE layer, T >= 0; ids are experts of the model.
  virtual Status dispatch(int64_t layer, const kernels::Tensor& hidden, const kernels::Tensor& ids) = 0;
  // Valid until the next call. The caller has to give_back() each before it asks for more.
  virtual Result<ReceivedSlots> receive() = 0;
  // The outputs of the last receive() are enqueued on the stream of prepare().
  virtual Status give_back() = 0;
  // f32 [T * k, H] in the order of the dispatched slots; valid until the next dispatch.
  virtual Result<kernels::Tensor> collect() = 0;
};

}  // namespace tandem::model
