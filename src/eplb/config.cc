#include "src/eplb/config.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "src/base/options.h"
#include "src/eplb/expert_load.h"

namespace tandem::eplb {
namespace {

constexpr int64_t kMaxSteps = 1'000'000'000;

const std::vector<std::string> kFields = {"window_size",      "step_interval", "num_redundant_experts",
                                          "log_balancedness", "use_async",     "policy"};

Error bad_field(const std::string& field, const nlohmann::json& value, std::string_view expected) {
  return invalid_argument("eplb-config." + field, "--eplb-config: {} is {}; it must be {}", field, value.dump(),
                          expected);
}

Status take_integer(const nlohmann::json& object, const std::string& field, int64_t min, int64_t max, int64_t& target) {
  const auto found = object.find(field);
  if (found == object.end()) return {};
  const bool in_range = found->is_number_integer() &&
                        (!found->is_number_unsigned() || found->get<uint64_t>() < 1ULL << 62) &&
                        found->get<int64_t>() >= min && found->get<int64_t>() <= max;
  if (!in_range) return bad_field(field, *found, fmt::format("an integer from {} to {}", min, max));
  target = found->get<int64_t>();
  return {};
}

Status take_flag(const nlohmann::json& object, const std::string& field, bool& target) {
  const auto found = object.find(field);
  if (found == object.end()) return {};
  if (!found->is_boolean()) return bad_field(field, *found, "true or false");
  target = found->get<bool>();
  return {};
}

Status take_policy(const nlohmann::json& object, Policy& target) {
  const auto found = object.find("policy");
  if (found == object.end()) return {};
  const Result<Policy> policy = found->is_string() ? parse_policy(found->get<std::string>()) : parse_policy("");
  if (!policy.ok()) return bad_field("policy", *found, "\"default\", \"swift\" or \"flash\"");
  target = *policy;
  return {};
}

}  // namespace

std::string EplbConfig::describe() const {
  return fmt::format("window_size {}, step_interval {}, num_redundant_experts {}, policy {}", window_size, step_interval,
                     num_redundant_experts, policy_name(policy));
}

Result<EplbConfig> parse_eplb_config(const std::string& json_text) {
  const nlohmann::json object = nlohmann::json::parse(json_text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) {
    return invalid_argument("eplb-config",
                            "--eplb-config: '{}' is not a JSON object such as '{{\"window_size\":1000}}'", json_text);
  }
  for (const auto& [field, value] : object.items()) {
    if (std::find(kFields.begin(), kFields.end(), field) != kFields.end()) continue;
    const std::string nearest = nearest_name(field, kFields);
    return invalid_argument("eplb-config." + field, "--eplb-config: unknown field '{}'; {}", field,
                            nearest.empty() ? fmt::format("the fields are {}", fmt::join(kFields, ", "))
                                            : fmt::format("did you mean '{}'?", nearest));
  }
  EplbConfig config;
  TANDEM_TRY(take_integer(object, "window_size", 1, kMaxSteps, config.window_size));
  TANDEM_TRY(take_integer(object, "step_interval", 1, kMaxSteps, config.step_interval));
  TANDEM_TRY(take_integer(object, "num_redundant_experts", 0, kMaxSlotsPerLayer, config.num_redundant_experts));
  TANDEM_TRY(take_flag(object, "log_balancedness", config.log_balancedness));
  TANDEM_TRY(take_flag(object, "use_async", config.use_async));
  TANDEM_TRY(take_policy(object, config.policy));
  return config;
}

}  // namespace tandem::eplb
