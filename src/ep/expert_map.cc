#include "src/ep/expert_map.h"

#include <algorithm>
#include <numeric>

namespace tandem::ep {

model::ExpertShard make_shard(int32_t rank, int32_t num_ranks, int32_t num_experts) {
  CHECK_GE(rank, 0);
  CHECK_LT(rank, num_ranks);
  CHECK_LE(num_ranks, num_experts);
  const int32_t least = num_experts / num_ranks;
  const int32_t rest = num_experts % num_ranks;
  model::ExpertShard shard{rank, num_ranks, std::vector<int32_t>(static_cast<size_t>(least + (rank < rest ? 1 : 0)))};
  std::iota(shard.slots.begin(), shard.slots.end(), rank * least + std::min(rank, rest));
  return shard;
}

ExpertMap ExpertMap::contiguous(int32_t num_ranks, int32_t num_experts) {
  const int32_t slots_per_rank = (num_experts + num_ranks - 1) / num_ranks;
  std::vector<int32_t> expert_of_slot;
  for (int32_t rank = 0; rank < num_ranks; ++rank) {
    const model::ExpertShard shard = make_shard(rank, num_ranks, num_experts);
    expert_of_slot.insert(expert_of_slot.end(), shard.slots.begin(), shard.slots.end());
    expert_of_slot.resize(static_cast<size_t>((rank + 1) * slots_per_rank), -1);
  }
  return ExpertMap(expert_of_slot, num_ranks, num_experts);
}

ExpertMap::ExpertMap(std::span<const int32_t> expert_of_slot, int32_t num_ranks, int32_t num_experts)
    : slots_per_rank_(static_cast<int32_t>(std::ssize(expert_of_slot)) / num_ranks),
      num_slots_(static_cast<int32_t>(std::ssize(expert_of_slot))),
      first_(static_cast<size_t>(num_experts) + 1) {
  CHECK_EQ(num_slots_ % num_ranks, 0);
  for (const int32_t expert : expert_of_slot) {
    CHECK_GE(expert, -1);
    CHECK_LT(expert, num_experts);
    if (expert >= 0) ++first_[static_cast<size_t>(expert) + 1];
  }
  for (size_t e = 0; e + 1 < first_.size(); ++e) {
    CHECK_GE(first_[e + 1], 1);
    first_[e + 1] += first_[e];
  }
  slots_.resize(static_cast<size_t>(first_.back()));
  std::vector<int32_t> next(first_.begin(), first_.end() - 1);
  for (int32_t slot = 0; slot < num_slots_; ++slot) {
    const int32_t expert = expert_of_slot[static_cast<size_t>(slot)];
    if (expert >= 0) slots_[static_cast<size_t>(next[static_cast<size_t>(expert)]++)] = slot;
  }
}

}  // namespace tandem::ep
