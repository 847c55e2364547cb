#include "src/eplb/placement.h"

#include <algorithm>

#include "src/base/check.h"
#include "src/eplb/expert_load.h"

namespace tandem::eplb {

int64_t count_even_nodes(std::span<const int32_t> first_of_node) {
  const size_t size = first_of_node.size();
  size_t each = 1;  // ranks of the first node
  while (each < size && first_of_node[each] == first_of_node[0]) ++each;
  if (size % each != 0) return 1;
  for (size_t r = 0; r < size; ++r) {
    if (first_of_node[r] != static_cast<int32_t>(r / each * each)) return 1;
  }
  return static_cast<int64_t>(size / each);
}

Status check_layout(const Layout& layout) {
  const auto check_range = [](const char* name, int64_t value, int64_t max) -> Status {
    if (value >= 1 && value <= max) return {};
    return invalid_argument(name, "{} is {}; it must be from 1 to {}", name, value, max);
  };
  TANDEM_TRY(check_range("experts", layout.num_experts, kMaxExperts));
  TANDEM_TRY(check_range("ranks", layout.num_ranks, kMaxRanks));
  TANDEM_TRY(check_range("nodes", layout.num_nodes, layout.num_ranks));
  TANDEM_TRY(check_range("groups", layout.num_groups, layout.num_experts));
  if (layout.num_redundant < 0 || layout.num_slots() > kMaxSlotsPerLayer) {
    return invalid_argument("redundant", "{} redundant experts; from 0 to {} are possible with {} experts",
                            layout.num_redundant, kMaxSlotsPerLayer - layout.num_experts, layout.num_experts);
  }
  if (layout.num_slots() < layout.num_ranks) {
    return invalid_argument("ranks",
                            "{} ranks, but only {} slots ({} experts and {} redundant): a rank would be empty; "
                            "take at most {} ranks or {} redundant experts",
                            layout.num_ranks, layout.num_slots(), layout.num_experts, layout.num_redundant,
                            layout.num_slots(), layout.num_ranks - layout.num_experts);
  }
  if (const int64_t rest = layout.num_slots() % layout.num_ranks; rest != 0) {
    const int64_t more = layout.num_redundant + layout.num_ranks - rest;
    const std::string fewer =
        layout.num_redundant >= rest ? fmt::format("{} or ", layout.num_redundant - rest) : std::string();
    return invalid_argument("redundant",
                            "{} experts and {} redundant ones do not divide evenly by {} ranks; take {}{} "
                            "redundant experts",
                            layout.num_experts, layout.num_redundant, layout.num_ranks, fewer, more);
  }
  if (layout.slots_per_rank() > layout.num_experts) {
    return invalid_argument("redundant",
                            "{} redundant experts give each of {} ranks {} slots for {} experts, more than "
                            "one copy of each; take at most {}",
                            layout.num_redundant, layout.num_ranks, layout.slots_per_rank(), layout.num_experts,
                            layout.num_experts * (layout.num_ranks - 1));
  }
  return {};
}

Placement::Placement(int64_t num_layers, const Layout& layout)
    : num_layers_(num_layers),
      num_experts_(layout.num_experts),
      num_ranks_(layout.num_ranks),
      slots_per_rank_(layout.slots_per_rank()),
      expert_of_slot_(static_cast<size_t>(num_layers * layout.num_slots())) {}

Placement Placement::initial(int64_t num_layers, const Layout& layout) {
  Placement placement(num_layers, layout);
  for (int64_t l = 0; l < num_layers; ++l) {
    const std::span<int32_t> slots = placement.layer(l);
    for (size_t s = 0; s < slots.size(); ++s) {
      slots[s] = static_cast<int32_t>(static_cast<int64_t>(s) % layout.num_experts);
    }
  }
  return placement;
}

std::span<int32_t> Placement::layer(int64_t index) {
  CHECK_LT(index, num_layers_);
  return std::span(expert_of_slot_).subspan(static_cast<size_t>(index * num_slots()), static_cast<size_t>(num_slots()));
}

std::span<const int32_t> Placement::layer(int64_t index) const {
  CHECK_LT(index, num_layers_);
  return std::span(expert_of_slot_).subspan(static_cast<size_t>(index * num_slots()), static_cast<size_t>(num_slots()));
}

bool Placement::fits(const Layout& layout) const {
  return num_experts_ == layout.num_experts && num_ranks_ == layout.num_ranks &&
         slots_per_rank_ == layout.slots_per_rank();
}

Status Placement::check() const {
  for (int64_t l = 0; l < num_layers_; ++l) {
    for (const int32_t expert : layer(l)) {
      if (expert >= 0 && expert < num_experts_) continue;
      return make_error(ErrorKind::kDataLoss, "layer {} has a slot for expert {}; experts are 0 … {}", l, expert,
                        num_experts_ - 1);
    }
    const std::vector<int32_t> copies = count_copies(layer(l), num_experts_);
    const auto missing = std::find(copies.begin(), copies.end(), 0);
    if (missing != copies.end()) {
      return make_error(ErrorKind::kDataLoss, "layer {} has no slot for expert {}", l, missing - copies.begin());
    }
  }
  return {};
}

std::vector<int32_t> count_copies(std::span<const int32_t> expert_of_slot, int64_t num_experts) {
  std::vector<int32_t> copies(static_cast<size_t>(num_experts));
  for (const int32_t expert : expert_of_slot) ++copies[static_cast<size_t>(expert)];
  return copies;
}

ReplicaTable::ReplicaTable(std::span<const int32_t> expert_of_slot, int64_t num_experts)
    : first_(static_cast<size_t>(num_experts) + 1), slots_(expert_of_slot.size()) {
  const std::vector<int32_t> copies = count_copies(expert_of_slot, num_experts);
  for (size_t e = 0; e < copies.size(); ++e) first_[e + 1] = first_[e] + copies[e];
  std::vector<int32_t> next(first_.begin(), first_.end() - 1);
  for (size_t s = 0; s < expert_of_slot.size(); ++s) {
    slots_[static_cast<size_t>(next[static_cast<size_t>(expert_of_slot[s])]++)] = static_cast<int32_t>(s);
  }
}

std::span<const int32_t> ReplicaTable::slots_of(int64_t expert) const {
  const size_t first = static_cast<size_t>(first_[static_cast<size_t>(expert)]);
  return std::span(slots_).subspan(first, static_cast<size_t>(first_[static_cast<size_t>(expert) + 1]) - first);
}

namespace {

// One rank of one layer.
void keep_slots_of_rank(std::span<const int32_t> current, std::span<int32_t> next) {
  std::vector<int32_t> incoming(next.begin(), next.end());
  std::vector<uint8_t> is_kept(next.size());
  for (size_t s = 0; s < current.size(); ++s) {
    const auto found = std::find(incoming.begin(), incoming.end(), current[s]);
    if (found == incoming.end()) continue;
    next[s] = current[s];
    is_kept[s] = 1;
    incoming.erase(found);
  }
  auto rest = incoming.begin();
  for (size_t s = 0; s < next.size(); ++s) {
    if (is_kept[s] == 0) next[s] = *rest++;
  }
  CHECK(rest == incoming.end());
}

}  // namespace

void keep_slots(const Placement& current, Placement& next) {
  CHECK_EQ(current.num_layers(), next.num_layers());
  CHECK_EQ(current.num_ranks(), next.num_ranks());
  CHECK_EQ(current.slots_per_rank(), next.slots_per_rank());
  const size_t per_rank = static_cast<size_t>(next.slots_per_rank());
  for (int64_t l = 0; l < next.num_layers(); ++l) {
    for (size_t rank = 0; rank < static_cast<size_t>(next.num_ranks()); ++rank) {
      keep_slots_of_rank(current.layer(l).subspan(rank * per_rank, per_rank),
                         next.layer(l).subspan(rank * per_rank, per_rank));
    }
  }
}

}  // namespace tandem::eplb
