// Which ranks hold the experts of a layer, and where: from an expert to a physical slot. Slots are numbered rank by
// rank: slot s is local expert s % slots_per_rank of rank s / slots_per_rank, as in src/eplb.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/base/check.h"
#include "src/eplb/placement.h"
#include "src/model/expert_exchange.h"

namespace tandem::ep {

// The experts that `rank` holds at start: a contiguous range; the first ranks have one more where they do not divide.
// 1 <= num_ranks <= num_experts.
model::ExpertShard make_shard(int32_t rank, int32_t num_ranks, int32_t num_experts);

class ExpertMap {
 public:
  ExpertMap() = default;
  // The ranges of make_shard. A rank with fewer experts than others leaves its last slot empty.
  static ExpertMap contiguous(int32_t num_ranks, int32_t num_experts);
  // The expert of each slot, -1 where it is empty; num_ranks * slots_per_rank of them. Every expert has a slot.
  ExpertMap(std::span<const int32_t> expert_of_slot, int32_t num_ranks, int32_t num_experts);

  int32_t slots_per_rank() const { return slots_per_rank_; }
  int32_t num_slots() const { return num_slots_; }
  int32_t num_experts() const { return static_cast<int32_t>(first_.size()) - 1; }
  // A slot of `expert`. Copies are equal, so any will do; `key` spreads the load over them.
  int32_t slot_of(int32_t expert, int64_t key) const {
    CHECK_GE(expert, 0);
    CHECK_LT(expert, num_experts());
    const int32_t first = first_[static_cast<size_t>(expert)];
    const int32_t copies = first_[static_cast<size_t>(expert) + 1] - first;
    const int32_t copy = copies == 1 ? 0 : eplb::choose_copy(key, expert, copies);
    return slots_[static_cast<size_t>(first + copy)];
  }

 private:
  int32_t slots_per_rank_ = 0;
  int32_t num_slots_ = 0;
  std::vector<int32_t> first_;  // [experts + 1]: where the slots of each begin
  std::vector<int32_t> slots_;
};

}  // namespace tandem::ep
