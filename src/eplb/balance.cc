#include "src/eplb/balance.h"

#include <algorithm>
#include <numeric>

#include "src/base/check.h"

namespace tandem::eplb {
namespace {

// Sums of what each layer's ranks carry, and at most carry.
struct Totals {
  double mean = 0;
  double max = 0;
};

BalanceReport finish_report(std::vector<double> layers, const Totals& totals) {
  BalanceReport report;
  report.layers = std::move(layers);
  if (report.layers.empty()) return report;
  std::vector<double> sorted = report.layers;
  std::sort(sorted.begin(), sorted.end());
  report.overall = totals.max > 0 ? totals.mean / totals.max : 1;
  report.p50 = sorted[sorted.size() / 2];
  report.p99 = sorted[sorted.size() / 100];
  report.worst = sorted.front();
  return report;
}

void add_layer(std::span<const double> loads, std::vector<double>& layers, Totals& totals) {
  layers.push_back(balancedness(loads));
  totals.max += *std::max_element(loads.begin(), loads.end());
  totals.mean += std::accumulate(loads.begin(), loads.end(), 0.0) / static_cast<double>(loads.size());
}

}  // namespace

std::vector<double> rank_loads(std::span<const int64_t> tokens, std::span<const int32_t> expert_of_slot,
                               int64_t num_ranks) {
  const std::vector<int32_t> copies = count_copies(expert_of_slot, static_cast<int64_t>(tokens.size()));
  const size_t per_rank = expert_of_slot.size() / static_cast<size_t>(num_ranks);
  std::vector<double> loads(static_cast<size_t>(num_ranks));
  for (size_t s = 0; s < expert_of_slot.size(); ++s) {
    const size_t expert = static_cast<size_t>(expert_of_slot[s]);
    loads[s / per_rank] += static_cast<double>(tokens[expert]) / copies[expert];
  }
  return loads;
}

double balancedness(std::span<const double> loads) {
  CHECK(!loads.empty());
  const double max = *std::max_element(loads.begin(), loads.end());
  if (max <= 0) return 1;
  return std::accumulate(loads.begin(), loads.end(), 0.0) / static_cast<double>(loads.size()) / max;
}

double balancedness(std::span<const int64_t> loads) {
  return balancedness(std::vector<double>(loads.begin(), loads.end()));
}

BalanceReport report_balance(const ExpertLoad& load, const Placement& placement) {
  CHECK_EQ(load.num_layers(), placement.num_layers());
  CHECK_EQ(load.num_experts(), placement.num_experts());
  std::vector<double> layers;
  Totals totals;
  for (int64_t l = 0; l < load.num_layers(); ++l) {
    add_layer(rank_loads(load.layer(l), placement.layer(l), placement.num_ranks()), layers, totals);
  }
  return finish_report(std::move(layers), totals);
}

BalanceReport report_expert_balance(const ExpertLoad& load) {
  std::vector<double> layers;
  Totals totals;
  for (int64_t l = 0; l < load.num_layers(); ++l) {
    const std::span<const int64_t> tokens = load.layer(l);
    add_layer(std::vector<double>(tokens.begin(), tokens.end()), layers, totals);
  }
  return finish_report(std::move(layers), totals);
}

}  // namespace tandem::eplb
