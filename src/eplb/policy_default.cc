// DeepSeek's algorithm; see policy.h for the source. Steps and ties follow its description, so that its published
// example comes out to the digit.
#include <algorithm>
#include <numeric>

#include "src/base/check.h"
#include "src/eplb/policy.h"

namespace tandem::eplb {
namespace {

// Where each item went.
struct Packing {
  std::vector<size_t> bin;
  std::vector<size_t> place;  // in its bin, in order of arrival
};

// Puts items into bins that take equally many, the heaviest first, each into the lightest bin with room.
Packing pack_evenly(std::span<const double> weights, size_t num_bins) {
  const size_t count = weights.size();
  const size_t per_bin = count / num_bins;
  CHECK_EQ(per_bin * num_bins, count);
  Packing packing{std::vector<size_t>(count), std::vector<size_t>(count)};
  if (per_bin == 1) {
    std::iota(packing.bin.begin(), packing.bin.end(), size_t{0});
    return packing;
  }
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return weights[a] > weights[b]; });
  std::vector<double> loads(num_bins);
  std::vector<size_t> filled(num_bins);
  for (const size_t item : order) {
    size_t best = num_bins;
    for (size_t b = 0; b < num_bins; ++b) {
      if (filled[b] < per_bin && (best == num_bins || loads[b] < loads[best])) best = b;
    }
    packing.bin[item] = best;
    packing.place[item] = filled[best]++;
    loads[best] += weights[item];
  }
  return packing;
}

// The slots of one node, in the order in which they were made: each expert once, then copies as they were given.
std::vector<size_t> list_copies(std::span<const double> weights, size_t num_slots, std::vector<int32_t>& copies) {
  std::vector<size_t> slots(weights.size());
  std::iota(slots.begin(), slots.end(), size_t{0});
  copies.assign(weights.size(), 1);
  while (slots.size() < num_slots) {
    size_t best = 0;
    for (size_t e = 1; e < weights.size(); ++e) {
      if (weights[e] / copies[e] > weights[best] / copies[best]) best = e;
    }
    ++copies[best];
    slots.push_back(best);
  }
  return slots;
}

// Experts node by node: the groups packed onto nodes, each group's experts in order.
std::vector<size_t> experts_by_node(std::span<const int64_t> tokens, size_t num_groups, size_t num_nodes) {
  const size_t group_size = tokens.size() / num_groups;
  std::vector<double> group_weights(num_groups);
  for (size_t e = 0; e < tokens.size(); ++e) group_weights[e / group_size] += static_cast<double>(tokens[e]);
  const Packing packing = pack_evenly(group_weights, num_nodes);
  std::vector<size_t> experts(tokens.size());
  for (size_t g = 0; g < num_groups; ++g) {
    const size_t first = (packing.bin[g] * (num_groups / num_nodes) + packing.place[g]) * group_size;
    for (size_t i = 0; i < group_size; ++i) experts[first + i] = g * group_size + i;
  }
  return experts;
}

// Replicates one node's experts and packs the copies onto its ranks; writes the node's slots.
void place_node(std::span<const int64_t> tokens, std::span<const size_t> experts, size_t num_ranks,
                std::span<int32_t> expert_of_slot) {
  std::vector<double> weights(experts.size());
  for (size_t i = 0; i < experts.size(); ++i) weights[i] = static_cast<double>(tokens[experts[i]]);
  std::vector<int32_t> copies;
  const std::vector<size_t> made = list_copies(weights, expert_of_slot.size(), copies);
  std::vector<double> shares(made.size());
  for (size_t i = 0; i < made.size(); ++i) shares[i] = weights[made[i]] / copies[made[i]];
  const Packing packing = pack_evenly(shares, num_ranks);
  const size_t per_rank = expert_of_slot.size() / num_ranks;
  for (size_t i = 0; i < made.size(); ++i) {
    expert_of_slot[packing.bin[i] * per_rank + packing.place[i]] = static_cast<int32_t>(experts[made[i]]);
  }
}

}  // namespace

std::vector<int32_t> place_layer_default(std::span<const int64_t> tokens, const Layout& layout) {
  const bool is_hierarchical = layout.is_hierarchical();
  const size_t num_nodes = is_hierarchical ? static_cast<size_t>(layout.num_nodes) : 1;
  const size_t num_groups = is_hierarchical ? static_cast<size_t>(layout.num_groups) : 1;
  const size_t ranks_per_node = static_cast<size_t>(layout.num_ranks) / num_nodes;
  const std::vector<size_t> experts = experts_by_node(tokens, num_groups, num_nodes);
  std::vector<int32_t> expert_of_slot(static_cast<size_t>(layout.num_slots()));
  const size_t node_experts = experts.size() / num_nodes;
  const size_t node_slots = expert_of_slot.size() / num_nodes;
  for (size_t n = 0; n < num_nodes; ++n) {
    place_node(tokens, std::span(experts).subspan(n * node_experts, node_experts), ranks_per_node,
               std::span(expert_of_slot).subspan(n * node_slots, node_slots));
  }
  return expert_of_slot;
}

}  // namespace tandem::eplb
