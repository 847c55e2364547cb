#include "src/eplb/policy.h"

#include <algorithm>

#include "src/base/check.h"

namespace tandem::eplb {
namespace {

Placement place_default(const RebalanceInput& input) {
  const ExpertLoad sum = sum_of(input.window);
  Placement next(sum.num_layers(), input.layout);
  for (int64_t l = 0; l < sum.num_layers(); ++l) {
    const std::vector<int32_t> slots = place_layer_default(sum.layer(l), input.layout);
    std::copy(slots.begin(), slots.end(), next.layer(l).begin());
  }
  return next;
}

}  // namespace

const char* policy_name(Policy policy) {
  switch (policy) {
    case Policy::kDefault:
      return "default";
    case Policy::kSwift:
      return "swift";
    case Policy::kFlash:
      return "flash";
  }
  return "?";
}

Result<Policy> parse_policy(std::string_view name) {
  for (const Policy policy : {Policy::kDefault, Policy::kSwift, Policy::kFlash}) {
    if (name == policy_name(policy)) return policy;
  }
  return invalid_argument("policy", "policy is '{}'; it must be default, swift or flash", name);
}

Placement rebalance(Policy policy, const RebalanceInput& input) {
  CHECK(!input.window.empty());
  CHECK(check_layout(input.layout).ok());
  CHECK(input.current.fits(input.layout));
  CHECK_EQ(input.current.num_layers(), input.window.front().num_layers());
  CHECK_EQ(input.layout.num_experts, input.window.front().num_experts());
  Placement next = policy == Policy::kDefault ? place_default(input)
                   : policy == Policy::kSwift ? place_swift(input)
                                              : place_flash(input);
  CHECK(next.check().ok());
  return next;
}

}  // namespace tandem::eplb
