// What a rank group's experts had to do lately, and how evenly its ranks shared it: for /metrics, and as the JSON of a heat
// map.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "src/eplb/balance.h"
#include "src/eplb/expert_load.h"
#include "src/eplb/placement.h"

namespace tandem::eplb {

struct LoadReport {
  int64_t steps = 0;          // of the window; 0: nothing has been counted yet
  int64_t num_nodes = 1;      // over which ranks are spread evenly and in order
  bool is_hierarchical = false;  // experts' groups stay on one node
  uint64_t changes = 0;       // of the placement, layer by layer, since the start
  ExpertLoad load;            // of all ranks
  Placement placement;        // that carried it
  BalanceReport balance;
  std::optional<BalanceReport> planned;  // of the last rebalance: what its window would have had on the new placement
};

// Tokens of each rank over all layers.
std::vector<double> total_rank_loads(const LoadReport& report);

// One JSON object. `layers`: the index in the model of each layer of the report. "tokens" is [layer][rank][slot], of the
// expert that "experts" names at the same place; an expert's tokens are shared evenly by its copies. As large as the
// model: some 20 bytes for each slot of each layer.
std::string format_load_report(const LoadReport& report, std::span<const int64_t> layers);

}  // namespace tandem::eplb
