// The value of --kv-transfer-config: vLLM's object, so that existing command lines keep their meaning.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "src/base/result.h"

namespace tandem {

enum class KvRole : uint8_t { kProducer, kConsumer, kBoth };
const char* kv_role_name(KvRole role);  // "kv_producer", "kv_consumer", "kv_both"

struct KvTransferConfig {
  std::string connector;  // as given: UcxConnector, NixlConnector, MooncakeConnectorV1 or DecodeBenchConnector
  KvRole role = KvRole::kBoth;
  std::string ip = "127.0.0.1";  // address that peers connect to
  int64_t port = 14579;          // 0: any free port
  std::string engine_id;         // "": drawn at start
  std::string buffer_device = "cpu";
  int64_t parallel_size = 1;
  std::string extra_config = "{}";  // kv_connector_extra_config, a JSON object
  // DecodeBenchConnector: the value that stands for the KV of every prompt, so that decode can be measured alone.
  std::optional<float> synthetic_fill;
  // Not empty when the connector is another system's name for ours; log it at start.
  std::string connector_note;
};

// An unknown or wrong field is an error that names it; kv_connector and kv_role are required.
Result<KvTransferConfig> parse_kv_transfer_config(const std::string& json_text);

}  // namespace tandem
