// Which expert each physical slot of each rank holds.
//
// A logical expert is the model's; a physical slot is a place for the weights of one. Slots are numbered rank by rank:
// slot s lies on rank s / slots_per_rank. Every expert has at least one copy, every slot is filled.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/base/result.h"

namespace tandem::eplb {

// The size of a placement problem.
struct Layout {
  int64_t num_experts = 0;
  int64_t num_redundant = 0;  // slots beyond one per expert, over all ranks
  int64_t num_ranks = 1;
  int64_t num_nodes = 1;
  int64_t num_groups = 1;  // of experts, from which the router takes a few (n_group); neighbours are one group

  int64_t num_slots() const { return num_experts + num_redundant; }
  int64_t slots_per_rank() const { return num_slots() / num_ranks; }
  // Groups can be given to nodes, so that a token's groups keep it on few nodes.
  bool is_hierarchical() const {
    return num_nodes > 1 && num_groups > 1 && num_groups % num_nodes == 0 && num_ranks % num_nodes == 0 &&
           num_experts % num_groups == 0;
  }
};
// The nodes that ranks are on, if each has equally many, which are neighbours; else 1. [rank]: the lowest rank of its node.
int64_t count_even_nodes(std::span<const int32_t> first_of_node);
// Errors name the value and the nearest that would do.
Status check_layout(const Layout& layout);

class Placement {
 public:
  Placement() = default;
  // All slots hold expert 0 until filled.
  Placement(int64_t num_layers, const Layout& layout);
  // Slot i holds expert i, and redundant slots the first experts again: what a model starts with.
  static Placement initial(int64_t num_layers, const Layout& layout);

  int64_t num_layers() const { return num_layers_; }
  int64_t num_experts() const { return num_experts_; }
  int64_t num_ranks() const { return num_ranks_; }
  int64_t slots_per_rank() const { return slots_per_rank_; }
  int64_t num_slots() const { return num_ranks_ * slots_per_rank_; }
  std::span<int32_t> layer(int64_t index);  // [slots]: the expert of each
  std::span<const int32_t> layer(int64_t index) const;
  bool fits(const Layout& layout) const;
  // Every expert is there and every slot names one.
  Status check() const;
  bool operator==(const Placement&) const = default;

 private:
  int64_t num_layers_ = 0;
  int64_t num_experts_ = 0;
  int64_t num_ranks_ = 1;
  int64_t slots_per_rank_ = 0;
  std::vector<int32_t> expert_of_slot_;  // [layers, slots]
};

// Copies of each expert in one layer.
std::vector<int32_t> count_copies(std::span<const int32_t> expert_of_slot, int64_t num_experts);

// Where the copies of each expert of one layer are: the table that dispatch reads.
class ReplicaTable {
 public:
  ReplicaTable(std::span<const int32_t> expert_of_slot, int64_t num_experts);
  std::span<const int32_t> slots_of(int64_t expert) const;  // ascending

 private:
  std::vector<int32_t> first_;  // [experts + 1]
  std::vector<int32_t> slots_;
};

// The copy that a token uses: which of `num_copies`, from the token's position and the expert alone, so that every rank
// computes the same without a message. Copies are equal, so results do not depend on it; only the load does. Positions
// are spread evenly by a multiplicative hash (Fibonacci hashing: Knuth, The Art of Computer Programming 3, 6.4), whose
// high bits choose.
inline int32_t choose_copy(int64_t position, int32_t expert, int32_t num_copies) {
  const uint64_t key = static_cast<uint64_t>(position) + static_cast<uint64_t>(expert) * 0x10001;
  const uint64_t mixed = (key * 0x9e3779b97f4a7c15) >> 32;
  return static_cast<int32_t>((mixed * static_cast<uint64_t>(num_copies)) >> 32);
}

// `next` with the slots of each rank put in another order: experts that stay on a rank stay in their slot of `current`.
void keep_slots(const Placement& current, Placement& next);

}  // namespace tandem::eplb
