#include "src/base/kv_transfer_config.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "src/base/options.h"

namespace tandem {
namespace {

const std::array<std::string, 8> kFields = {"kv_connector",
                                            "kv_role",
                                            "kv_ip",
                                            "kv_port",
                                            "engine_id",
                                            "kv_buffer_device",
                                            "kv_parallel_size",
                                            "kv_connector_extra_config"};

constexpr float kDefaultFill = 0.015F;

Error bad_field(const std::string& field, const nlohmann::json& value, std::string_view expected) {
  return invalid_argument("kv-transfer-config." + field, "--kv-transfer-config: {} is {}; it must be {}", field,
                          value.dump(), expected);
}

Result<std::string> take_text(const nlohmann::json& object, const std::string& field, std::string fallback) {
  const auto found = object.find(field);
  if (found == object.end() || found->is_null()) return fallback;
  if (!found->is_string() || found->get_ref<const std::string&>().empty()) return bad_field(field, *found, "a text");
  return found->get<std::string>();
}

Result<int64_t> take_integer(const nlohmann::json& object, const std::string& field, int64_t fallback, int64_t min,
                             int64_t max) {
  const auto found = object.find(field);
  if (found == object.end() || found->is_null()) return fallback;
  const bool in_range = found->is_number_integer() && found->get<int64_t>() >= min && found->get<int64_t>() <= max;
  if (!in_range) return bad_field(field, *found, fmt::format("an integer from {} to {}", min, max));
  return found->get<int64_t>();
}

Status take_connector(const nlohmann::json& object, KvTransferConfig& config) {
  TANDEM_ASSIGN(config.connector, take_text(object, "kv_connector", ""));
  if (config.connector == "UcxConnector") return {};
  if (config.connector == "NixlConnector" || config.connector == "MooncakeConnectorV1") {
    config.connector_note =
        fmt::format("kv_connector {} is served by UcxConnector; its peers must be Tandem workers", config.connector);
    return {};
  }
  if (config.connector == "DecodeBenchConnector") {
    config.synthetic_fill = kDefaultFill;
    return {};
  }
  return bad_field("kv_connector", object.value("kv_connector", nlohmann::json()),
                   "UcxConnector (NixlConnector and MooncakeConnectorV1 are taken as names for it) or "
                   "DecodeBenchConnector");
}

// {"fill_mean": 0.015, "fill_std": 0}, as vLLM's connector of this name.
Status take_fill(const nlohmann::json& extra, KvTransferConfig& config) {
  for (const auto& [field, value] : extra.items()) {
    const std::string name = "kv_connector_extra_config." + field;
    if (field != "fill_mean" && field != "fill_std") return bad_field(name, value, "absent: it has fill_mean and fill_std");
    if (!value.is_number()) return bad_field(name, value, "a number");
    if (field == "fill_std" && value != 0) return bad_field(name, value, "0: every position is filled alike");
    if (field == "fill_mean") config.synthetic_fill = value.get<float>();
  }
  return {};
}

Status take_role(const nlohmann::json& object, KvTransferConfig& config) {
  TANDEM_ASSIGN(const std::string role, take_text(object, "kv_role", ""));
  for (const KvRole candidate : {KvRole::kProducer, KvRole::kConsumer, KvRole::kBoth}) {
    if (role == kv_role_name(candidate)) {
      config.role = candidate;
      return {};
    }
  }
  return bad_field("kv_role", object.value("kv_role", nlohmann::json()), "kv_producer, kv_consumer or kv_both");
}

}  // namespace

const char* kv_role_name(KvRole role) {
  switch (role) {
    case KvRole::kProducer:
      return "kv_producer";
    case KvRole::kConsumer:
      return "kv_consumer";
    case KvRole::kBoth:
      return "kv_both";
  }
  return "?";
}

Result<KvTransferConfig> parse_kv_transfer_config(const std::string& json_text) {
  const nlohmann::json object = nlohmann::json::parse(json_text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) {
    return invalid_argument("kv-transfer-config", "--kv-transfer-config: '{}' is not a JSON object", json_text);
  }
  for (const auto& [field, value] : object.items()) {
    if (std::find(kFields.begin(), kFields.end(), field) != kFields.end()) continue;
    const std::string nearest = nearest_name(field, kFields);
    return invalid_argument("kv-transfer-config." + field, "--kv-transfer-config: unknown field '{}'{}", field,
                            nearest.empty() ? "" : fmt::format("; did you mean '{}'?", nearest));
  }
  KvTransferConfig config;
  TANDEM_TRY(take_connector(object, config));
  TANDEM_TRY(take_role(object, config));
  TANDEM_ASSIGN(config.ip, take_text(object, "kv_ip", config.ip));
  TANDEM_ASSIGN(config.port, take_integer(object, "kv_port", config.port, 0, 65535));
  TANDEM_ASSIGN(config.engine_id, take_text(object, "engine_id", ""));
  TANDEM_ASSIGN(config.buffer_device, take_text(object, "kv_buffer_device", config.buffer_device));
  if (config.buffer_device != "cpu") {
    return bad_field("kv_buffer_device", object.at("kv_buffer_device"), "cpu, the only device of this build");
  }
  TANDEM_ASSIGN(config.parallel_size, take_integer(object, "kv_parallel_size", 1, 1, 65536));
  if (const auto extra = object.find("kv_connector_extra_config"); extra != object.end() && !extra->is_null()) {
    if (!extra->is_object()) return bad_field("kv_connector_extra_config", *extra, "an object");
    config.extra_config = extra->dump();
    if (config.synthetic_fill) TANDEM_TRY(take_fill(*extra, config));
  }
  return config;
}

}  // namespace tandem
