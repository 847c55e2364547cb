// The value of --eplb-config: vLLM's object.
#pragma once

#include <cstdint>
#include <string>

#include "src/base/result.h"
#include "src/eplb/policy.h"

namespace tandem::eplb {

struct EplbConfig {
  int64_t window_size = 1000;         // steps whose loads count
  int64_t step_interval = 3000;       // steps between two rebalances
  int64_t num_redundant_experts = 0;  // over all ranks
  bool log_balancedness = false;
  bool use_async = true;  // weights move while steps go on
  Policy policy = Policy::kDefault;

  // All that ranks of a group must agree on: equal texts mean the same.
  std::string describe() const;
};

// Missing fields keep their defaults. An unknown field or a bad value is an error with value, limit and remedy.
Result<EplbConfig> parse_eplb_config(const std::string& json_text);

}  // namespace tandem::eplb
