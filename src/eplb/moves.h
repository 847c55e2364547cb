// What has to travel so that one placement becomes another.
#pragma once

#include <cstdint>
#include <vector>

#include "src/eplb/placement.h"

namespace tandem::eplb {

// Rank slot / slots_per_rank gets `expert` into `slot`, from `source_slot` of the old placement: of another rank, or of
// its own when it only changes places.
struct Move {
  int32_t slot = 0;
  int32_t expert = 0;
  int32_t source_slot = 0;
  bool operator==(const Move&) const = default;
};

struct LayerMoves {
  std::vector<Move> local;   // inside a rank, ascending slots
  std::vector<Move> remote;  // between ranks, ascending slots
};

struct MovePlan {
  std::vector<LayerMoves> layers;

  int64_t num_local() const;
  int64_t num_remote() const;
};

// The same on every rank. Receivers of an expert are spread over the ranks that have it, each source being the one that
// sends least in this layer so far, in the receiver's node where it has one, and among equals the lowest.
MovePlan plan_moves(const Placement& from, const Placement& to, int64_t num_nodes);

}  // namespace tandem::eplb
