// How evenly a placement spreads a load. The measure is balancedness, mean / max of the ranks' tokens: 1 is perfect,
// 1 / ranks the worst. All ranks of a layer wait for the fullest, so it is also the share of their time that is used.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/eplb/expert_load.h"
#include "src/eplb/placement.h"

namespace tandem::eplb {

// Tokens of each rank in one layer, the copies of an expert sharing its tokens evenly.
std::vector<double> rank_loads(std::span<const int64_t> tokens, std::span<const int32_t> expert_of_slot,
                               int64_t num_ranks);
// mean / max; 1 when nothing was loaded.
double balancedness(std::span<const double> loads);
double balancedness(std::span<const int64_t> loads);

struct BalanceReport {
  std::vector<double> layers;  // balancedness of each
  double overall = 1;          // Σ mean / Σ max over the layers: the share of the ranks' time that is used
  double p50 = 1;              // half of the layers reach at least this
  double p99 = 1;              // 99 % of them
  double worst = 1;
};
BalanceReport report_balance(const ExpertLoad& load, const Placement& placement);
// As if every expert were a rank of its own: what the router does, without a placement.
BalanceReport report_expert_balance(const ExpertLoad& load);

}  // namespace tandem::eplb
