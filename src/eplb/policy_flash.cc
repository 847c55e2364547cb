// Placement against loads that vary: after the description of the "FlashLB" policy of vLLM for Ascend
// (github.com/vllm-project/vllm, pull request 37656, and vllm-ascend's user guide).
//
//  - An expert weighs mean + z * deviation over the window's samples; a rank likewise, its deviation being that of the
//    sum, so experts that rise together are kept apart.
//  - The numbers of copies are searched in a tree of depth 4 and width 8 from the greedy ones, each node being packed
//  and
//    scored on the samples themselves: the mean over them of the fullest rank, which is what a step waits for.
//  - The chosen numbers are reached from the current placement and also packed from scratch, onto the ranks that have
//  most
//    of each set already (an assignment problem). From scratch is taken only if it is better by more than 1 %.
//  - A layer that is even enough, and not much worse than after its last rebalance, stays as it is.
// The search of single swaps is our own addition.
#include <algorithm>
#include <map>
#include <optional>

#include "src/base/check.h"
#include "src/eplb/assignment.h"
#include "src/eplb/policy.h"
#include "src/eplb/rank_fill.h"
#include "src/eplb/replicate.h"

namespace tandem::eplb {
namespace {

constexpr double kDeviations = 0.674;  // z: three samples of four lie below, if they are normally distributed
constexpr int kDepth = 4;
constexpr size_t kWidth = 8;
constexpr size_t kBranches = 4;           // experts that give, and that take, a copy: 16 children of a node
constexpr double kNothingToGain = 1.002;  // of peak / mean: the search ends
constexpr double kWorthScratch = 0.99;    // from scratch must be better than this times the other
constexpr double kLightCopy = 0.5;        // as in policy_swift.cc
constexpr int64_t kFewRanks = 32;         // below, a layer is updated earlier

using Copies = std::vector<int32_t>;

struct Node {
  Copies copies;
  double peak = 0;  // mean over the samples
};

double score_copies(const LayerDemand& demand, const Layout& layout, const Copies& copies) {
  const std::vector<int32_t> empty(static_cast<size_t>(layout.num_slots()), RankFill::kEmpty);
  RankFill fill(demand, layout.num_ranks, empty);
  fill.set_copies(copies);
  return fill.mean_peak();
}

// Experts by `key`, smallest first, at most `count`; those with an infinite key are left out.
template <typename Key>
std::vector<size_t> smallest_by(size_t num_experts, size_t count, const Key& key) {
  std::vector<std::pair<double, size_t>> keyed;
  for (size_t e = 0; e < num_experts; ++e) {
    if (const std::optional<double> value = key(e)) keyed.emplace_back(*value, e);
  }
  count = std::min(count, keyed.size());
  std::partial_sort(keyed.begin(), keyed.begin() + static_cast<std::ptrdiff_t>(count), keyed.end());
  std::vector<size_t> experts;
  for (size_t i = 0; i < count; ++i) experts.push_back(keyed[i].second);
  return experts;
}

// Children of a node: one copy passes from one of those that miss it least to one of those whose copies carry most.
std::vector<Copies> branch(const std::vector<double>& weights, const Copies& copies, int64_t max_copies) {
  const std::vector<size_t> givers = smallest_by(copies.size(), kBranches, [&](size_t e) {
    return copies[e] > 1 ? std::optional<double>(weights[e] / (copies[e] - 1)) : std::nullopt;
  });
  const std::vector<size_t> takers = smallest_by(copies.size(), kBranches, [&](size_t e) {
    return copies[e] < max_copies ? std::optional<double>(-weights[e] / copies[e]) : std::nullopt;
  });
  std::vector<Copies> children;
  for (const size_t giver : givers) {
    for (const size_t taker : takers) {
      if (giver == taker) continue;
      Copies& child = children.emplace_back(copies);
      --child[giver];
      ++child[taker];
    }
  }
  return children;
}

// The best numbers of copies found, by their score after packing.
Copies search_copies(const LayerDemand& demand, const Layout& layout) {
  const std::vector<double> weights = demand.weights();
  double mean = 0;
  for (const double tokens : demand.mean) mean += tokens / static_cast<double>(layout.num_ranks);
  Copies greedy = replicate(weights, layout.num_slots(), layout.num_ranks);
  Node best{greedy, score_copies(demand, layout, greedy)};
  std::map<Copies, double> scored{{best.copies, best.peak}};
  std::vector<Node> frontier{best};
  for (int depth = 0; depth < kDepth && best.peak > kNothingToGain * mean; ++depth) {
    std::vector<Node> next;
    for (const Node& node : frontier) {
      for (Copies& child : branch(weights, node.copies, layout.num_ranks)) {
        const auto [entry, is_new] = scored.try_emplace(child, 0.0);
        if (!is_new) continue;
        entry->second = score_copies(demand, layout, child);
        next.push_back({std::move(child), entry->second});
      }
    }
    std::stable_sort(next.begin(), next.end(), [](const Node& a, const Node& b) { return a.peak < b.peak; });
    if (next.size() > kWidth) next.resize(kWidth);
    if (next.empty()) break;
    if (next.front().peak < best.peak) best = next.front();
    frontier = std::move(next);
  }
  return best.copies;
}

// `slots` with its ranks renumbered so that as many experts as possible are where they are in `current`.
std::vector<int32_t> match_ranks(std::span<const int32_t> current, const std::vector<int32_t>& slots,
                                 const Layout& layout) {
  const size_t ranks = static_cast<size_t>(layout.num_ranks);
  const size_t per_rank = static_cast<size_t>(layout.slots_per_rank());
  std::vector<std::vector<size_t>> holders(static_cast<size_t>(layout.num_experts));
  for (size_t s = 0; s < current.size(); ++s) holders[static_cast<size_t>(current[s])].push_back(s / per_rank);
  std::vector<int32_t> common(ranks * ranks);
  for (size_t s = 0; s < slots.size(); ++s) {
    for (const size_t rank : holders[static_cast<size_t>(slots[s])]) ++common[s / per_rank * ranks + rank];
  }
  const std::vector<int32_t> place = assign_best(common, layout.num_ranks);
  std::vector<int32_t> matched(slots.size());
  for (size_t r = 0; r < ranks; ++r) {
    std::copy_n(slots.begin() + static_cast<std::ptrdiff_t>(r * per_rank), per_rank,
                matched.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(place[r]) * per_rank));
  }
  return matched;
}

bool is_good_enough(double balance, double past, int64_t num_ranks) {
  const bool few = num_ranks < kFewRanks;
  if (balance < (few ? 0.95 : 0.85)) return false;
  return balance >= (few ? 0.95 : 0.9) * past;
}

RankFill reach_from(std::span<const int32_t> slots, const LayerDemand& demand, const Layout& layout,
                    const Copies& copies) {
  RankFill fill(demand, layout.num_ranks, slots);
  fill.drop_duplicates();
  fill.set_copies(copies);
  fill.swap_experts({});
  return fill;
}

void place_layer(const RebalanceInput& input, int64_t layer, std::span<int32_t> next) {
  const Layout& layout = input.layout;
  const LayerDemand demand = LayerDemand::of_samples(input.window, layer, kDeviations);
  const RankFill current(demand, layout.num_ranks, next);
  const double mean = current.mean_tokens();
  if (mean <= 0 && !current.has_duplicates()) return;
  const double past = input.past_balance.empty() ? 0 : input.past_balance[static_cast<size_t>(layer)];
  if (!current.has_duplicates() && is_good_enough(mean / current.mean_peak(), past, layout.num_ranks)) return;

  const Copies copies = search_copies(demand, layout);
  const std::vector<double> weights = demand.weights();
  // As near to the current numbers as possible, unless the searched ones are clearly better.
  RankFill best = reach_from(next, demand, layout, copies);
  if (!current.has_duplicates()) {
    RankFill nearer =
        reach_from(next, demand, layout, shift_copies(weights, current.copies(), layout.num_ranks, kLightCopy * mean));
    if (kWorthScratch * nearer.mean_peak() <= best.mean_peak()) best = std::move(nearer);
  }
  const std::vector<int32_t> empty(next.size(), RankFill::kEmpty);
  const RankFill scratch = reach_from(empty, demand, layout, copies);
  std::vector<int32_t> slots = best.slots();
  double peak = best.mean_peak();
  if (scratch.mean_peak() < kWorthScratch * peak) {
    slots = match_ranks(next, scratch.slots(), layout);
    peak = scratch.mean_peak();
  }
  if (!current.has_duplicates() && peak >= current.mean_peak()) return;
  std::copy(slots.begin(), slots.end(), next.begin());
}

}  // namespace

Placement place_flash(const RebalanceInput& input) {
  CHECK(input.past_balance.empty() || static_cast<int64_t>(input.past_balance.size()) == input.current.num_layers());
  Placement next = input.current;
  for (int64_t l = 0; l < next.num_layers(); ++l) place_layer(input, l, next.layer(l));
  return next;
}

}  // namespace tandem::eplb
