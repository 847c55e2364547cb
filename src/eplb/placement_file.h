// A placement as one JSON object:
//   {"format":"tandem-expert-placement","version":1,"layers":[1,2,3,4],"num_experts":16,"num_ranks":4,"slots_per_rank":5,
//    "slots":[[…],…]}
// `layers` are indices in the model; slots[i][s] is the expert in physical slot s of layer layers[i], on rank
// s / slots_per_rank.
#pragma once

#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/eplb/placement.h"

namespace tandem::eplb {

struct StoredPlacement {
  std::vector<int64_t> layers;
  Placement placement;
};

std::string format_placement(const StoredPlacement& stored);
// Errors are one line that names `name`, value and remedy.
Result<StoredPlacement> parse_placement(const std::string& text, const std::string& name);
Result<StoredPlacement> read_placement_file(const std::string& path);

}  // namespace tandem::eplb
