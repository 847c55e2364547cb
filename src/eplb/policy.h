// The policies that turn a window of loads into a placement. Pure: the same input gives the same placement, so ranks
// that know the same window need not tell each other the result.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "src/eplb/expert_load.h"
#include "src/eplb/placement.h"

namespace tandem::eplb {

enum class Policy : uint8_t {
  kDefault,  // from scratch, by the window's sum; hierarchical if groups and nodes divide
  kSwift,    // few moves from the current placement
  kFlash,    // few moves, and reckons with how loads vary inside the window
};
const char* policy_name(Policy policy);  // "default", "swift", "flash"
Result<Policy> parse_policy(std::string_view name);

struct RebalanceInput {
  const LoadSeries& window;  // at least one load
  const Layout& layout;      // passed check_layout
  const Placement& current;  // as `layout` says
  // Balancedness of each layer right after its last rebalance, for `flash`; empty: unknown.
  std::span<const double> past_balance = {};
};

// What each policy promises beside a valid placement:
//  kSwift, kFlash: no rank holds two copies of an expert; on the window no layer is less balanced (by tokens; for
//  kFlash by its mean peak) than in `current`, unless that broke the first rule.
Placement rebalance(Policy policy, const RebalanceInput& input);

// The single policies, one layer or placement each; rebalance() calls them.
//
// DeepSeek's expert-parallel load balancer (github.com/deepseek-ai/EPLB, described in its README and in the DeepSeek-V3
// report): groups of experts are packed onto nodes, experts replicated inside each node, copies packed onto its ranks.
// With one node or groups that do not divide it is the same with one group and one node. Returns expert of slot.
std::vector<int32_t> place_layer_default(std::span<const int64_t> tokens, const Layout& layout);
Placement place_swift(const RebalanceInput& input);
Placement place_flash(const RebalanceInput& input);

}  // namespace tandem::eplb
