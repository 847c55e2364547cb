// How much memory a model will take, from its config and the list of its weights, before any of them is read.
#pragma once

#include <cstdint>

#include "src/model/config.h"
#include "src/model/family.h"
#include "src/model/kv_cache.h"
#include "src/model/weights.h"

namespace tandem::model {

struct MemoryNeeds {
  int64_t weight_bytes = 0;     // packed; right within a few per cent
  int64_t expert_bytes = 0;     // of these, in routed experts
  int64_t staging_bytes = 0;    // most that packing holds besides: one weight as it was
  int64_t workspace_bytes = 0;  // of a step, at most; without what kernels keep for themselves
  int64_t max_model_len = 0;
  KvLayout kv;
};

// Sets weight_bytes, expert_bytes and staging_bytes to those of all that is listed.
void count_weights(const WeightPlan& plan, MemoryNeeds& needs);

// Activations, logits and tables of the largest step, with LoadOptions::keep_routing also its routing.
int64_t workspace_bytes(const ModelConfig& config, const Capacity& capacity, bool keep_routing);

}  // namespace tandem::model
