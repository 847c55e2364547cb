// The `kv_transfer_params` object of the OpenAI wire, with vLLM's field names, and the address of one transfer.
//
// Pull (other people's proxies): the prefill leg is asked with do_remote_decode; its response carries an object with
// do_remote_prefill and the remote_* fields, which the client gives verbatim to the decode leg.
// Push (our router): the decode leg is asked first with do_remote_prefill and transfer_mode "push"; its first event
// carries an object with do_remote_decode and its own address, which the router gives to the prefill leg.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "src/base/ids.h"
#include "src/base/result.h"

namespace tandem::transfer {

enum class TransferMode : uint8_t { kPull, kPush };

struct KvTransferParams {
  bool do_remote_decode = false;
  bool do_remote_prefill = false;
  TransferMode mode = TransferMode::kPull;
  std::string remote_engine_id;    // "<engine_id>:<incarnation>" of the peer; changes when the peer restarts
  std::string remote_request_id;   // the peer's handle "<request>-<nonce>", used once
  std::string remote_host;  // an IPv6 address without brackets, which JSON may have
  int64_t remote_port = 0;
  int64_t remote_num_tokens = 0;   // prompt tokens the peer holds (pull) or expects (push)
  int64_t remote_cached_tokens = 0;  // push: leading tokens the decode side already has in its prefix cache
  int64_t tp_size = 1;
  std::vector<std::vector<int64_t>> remote_block_ids;  // per KV-cache group, as vLLM; informative, never trusted
  std::optional<double> remote_blocks_expiry_time;
  std::vector<TokenId> prompt_token_ids;  // pull: the prompt as the prefill side saw it; the decode side uses it
};

// Unknown fields are ignored, nulls count as absent, wrong types are errors with param "kv_transfer_params.<field>".
Result<KvTransferParams> parse_kv_transfer_params(const nlohmann::json& json);
nlohmann::json to_json(const KvTransferParams& params);

}  // namespace tandem::transfer
