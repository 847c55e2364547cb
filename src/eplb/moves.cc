#include "src/eplb/moves.h"

#include <algorithm>

#include "src/base/check.h"

namespace tandem::eplb {
namespace {

struct Need {
  int32_t slot = 0;
  int32_t expert = 0;
};

class LayerPlanner {
 public:
  LayerPlanner(std::span<const int32_t> from, const Placement& shape, int64_t num_nodes)
      : from_(from),
        sources_(from, shape.num_experts()),
        per_rank_(shape.slots_per_rank()),
        // Ranks that do not divide by nodes are of one node, as for the placement.
        ranks_per_node_(shape.num_ranks() % num_nodes == 0 ? shape.num_ranks() / num_nodes : shape.num_ranks()),
        sent_(static_cast<size_t>(shape.num_ranks())) {}

  LayerMoves plan(std::span<const int32_t> to) {
    LayerMoves moves;
    std::vector<Need> needs;
    for (size_t s = 0; s < to.size(); ++s) {
      if (to[s] == from_[s]) continue;
      const int32_t slot = static_cast<int32_t>(s);
      if (const int32_t own = find_own(slot, to[s]); own >= 0) {
        moves.local.push_back({slot, to[s], own});
      } else {
        needs.push_back({slot, to[s]});
      }
    }
    // Those with the fewest sources choose first: they have no choice to make later.
    std::stable_sort(needs.begin(), needs.end(), [this](const Need& a, const Need& b) {
      return sources_.slots_of(a.expert).size() < sources_.slots_of(b.expert).size();
    });
    for (const Need& need : needs) moves.remote.push_back({need.slot, need.expert, choose_source(need)});
    std::sort(moves.remote.begin(), moves.remote.end(), [](const Move& a, const Move& b) { return a.slot < b.slot; });
    return moves;
  }

 private:
  int64_t rank_of(int32_t slot) const { return slot / per_rank_; }
  int64_t node_of(int32_t slot) const { return rank_of(slot) / ranks_per_node_; }

  int32_t find_own(int32_t slot, int32_t expert) const {
    for (const int32_t source : sources_.slots_of(expert)) {
      if (rank_of(source) == rank_of(slot)) return source;
    }
    return -1;
  }

  int32_t choose_source(const Need& need) {
    int32_t best = -1;
    const auto is_better = [&](int32_t source) {
      if (best < 0) return true;
      const bool near = node_of(source) == node_of(need.slot);
      if (near != (node_of(best) == node_of(need.slot))) return near;
      return sent_[static_cast<size_t>(rank_of(source))] < sent_[static_cast<size_t>(rank_of(best))];
    };
    for (const int32_t source : sources_.slots_of(need.expert)) {
      if (is_better(source)) best = source;
    }
    CHECK_GE(best, 0);
    ++sent_[static_cast<size_t>(rank_of(best))];
    return best;
  }

  std::span<const int32_t> from_;
  ReplicaTable sources_;
  int64_t per_rank_;
  int64_t ranks_per_node_;
  std::vector<int64_t> sent_;  // [ranks]
};

}  // namespace

int64_t MovePlan::num_local() const {
  int64_t count = 0;
  for (const LayerMoves& layer : layers) count += std::ssize(layer.local);
  return count;
}

int64_t MovePlan::num_remote() const {
  int64_t count = 0;
  for (const LayerMoves& layer : layers) count += std::ssize(layer.remote);
  return count;
}

MovePlan plan_moves(const Placement& from, const Placement& to, int64_t num_nodes) {
  CHECK_EQ(from.num_layers(), to.num_layers());
  CHECK_EQ(from.num_experts(), to.num_experts());
  CHECK_EQ(from.num_ranks(), to.num_ranks());
  CHECK_EQ(from.slots_per_rank(), to.slots_per_rank());
  MovePlan plan;
  for (int64_t l = 0; l < from.num_layers(); ++l) {
    plan.layers.push_back(LayerPlanner(from.layer(l), from, num_nodes).plan(to.layer(l)));
  }
  return plan;
}

}  // namespace tandem::eplb
