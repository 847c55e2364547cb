#include "src/transfer/params.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

namespace tandem::transfer {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxIdBytes = 256;
constexpr size_t kMaxHostBytes = 253;
constexpr size_t kMaxBlocks = size_t{1} << 20;
constexpr size_t kMaxTokens = size_t{1} << 24;
constexpr int64_t kMaxCount = int64_t{1} << 31;
constexpr int64_t kMaxPort = 65535;
constexpr int64_t kMaxBlockId = std::numeric_limits<int32_t>::max();

// Reads the fields of one object; the first fault is kept.
class Fields {
 public:
  explicit Fields(const Json& object) : object_(object) {}

  void read_bool(const char* name, bool& value) {
    const Json* field = find(name);
    if (field == nullptr) return;
    if (!field->is_boolean()) return fail(name, "must be true or false");
    value = field->get<bool>();
  }
  void read_text(const char* name, std::string& value, size_t limit) {
    const Json* field = find(name);
    if (field == nullptr) return;
    if (!field->is_string()) return fail(name, "must be a string");
    value = field->get<std::string>();
    if (value.size() > limit) return fail(name, fmt::format("has {} bytes, allowed are {}", value.size(), limit));
    for (char c : value) {
      if (static_cast<unsigned char>(c) <= 0x20 || c == 0x7f) return fail(name, "has blanks or control characters");
    }
  }
  void read_int(const char* name, int64_t& value, int64_t low, int64_t high) {
    const Json* field = find(name);
    if (field == nullptr) return;
    if (!to_int(*field, low, high, value)) fail(name, fmt::format("must be an integer of {} … {}", low, high));
  }
  void read_mode(const char* name, TransferMode& mode) {
    std::string text;
    read_text(name, text, 16);
    if (text.empty() || text == "pull") return;
    if (text != "push") return fail(name, "must be \"pull\" or \"push\"");
    mode = TransferMode::kPush;
  }
  void read_time(const char* name, std::optional<double>& value) {
    const Json* field = find(name);
    if (field == nullptr) return;
    if (!field->is_number() || !std::isfinite(field->get<double>())) return fail(name, "must be a finite number");
    value = field->get<double>();
  }
  // A list of lists, one per KV-cache group; a flat list of integers is one group.
  void read_blocks(const char* name, std::vector<std::vector<int64_t>>& groups) {
    const Json* field = find(name);
    if (field == nullptr) return;
    if (!field->is_array()) return fail(name, "must be a list of block ids, or a list of such lists");
    const bool flat = !field->empty() && !field->front().is_array();
    size_t total = 0;
    const auto read_group = [&](const Json& list) {
      if (!list.is_array()) return fail(name, "mixes block ids and lists");
      std::vector<int64_t>& group = groups.emplace_back();
      total += list.size();
      if (total > kMaxBlocks) return fail(name, fmt::format("has more than {} block ids", kMaxBlocks));
      for (const Json& item : list) {
        int64_t id = 0;
        if (!to_int(item, 0, kMaxBlockId, id))
          return fail(name, fmt::format("block ids are integers of 0 … {}", kMaxBlockId));
        group.push_back(id);
      }
    };
    if (flat) return read_group(*field);
    if (field->size() > 64) return fail(name, "has more than 64 groups");
    for (const Json& list : *field) read_group(list);
  }
  void read_tokens(const char* name, std::vector<TokenId>& tokens) {
    const Json* field = find(name);
    if (field == nullptr) return;
    if (!field->is_array()) return fail(name, "must be a list of token ids");
    if (field->size() > kMaxTokens) return fail(name, fmt::format("has more than {} token ids", kMaxTokens));
    for (const Json& item : *field) {
      int64_t id = 0;
      if (!to_int(item, 0, std::numeric_limits<TokenId>::max(), id)) {
        return fail(name, fmt::format("token ids are integers of 0 … {}", std::numeric_limits<TokenId>::max()));
      }
      tokens.push_back(static_cast<TokenId>(id));
    }
  }
  const std::optional<Error>& error() const { return error_; }

 private:
  const Json* find(const char* name) const {
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  static bool to_int(const Json& item, int64_t low, int64_t high, int64_t& value) {
    if (!item.is_number_integer()) return false;
    if (item.is_number_unsigned() &&
        item.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return false;
    }
    value = item.get<int64_t>();
    return value >= low && value <= high;
  }
  void fail(const char* name, const std::string& what) {
    if (!error_) error_ = invalid_argument(fmt::format("kv_transfer_params.{}", name), "{} {}", name, what);
  }

  const Json& object_;
  std::optional<Error> error_;
};

// "[::1]" is how addresses with ports spell "::1", which is what is resolved.
void drop_brackets(std::string& host) {
  const bool is_bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (is_bracketed && host.find(':') != std::string::npos) host = host.substr(1, host.size() - 2);
}

}  // namespace

Result<KvTransferParams> parse_kv_transfer_params(const Json& json) {
  if (!json.is_object()) return invalid_argument("kv_transfer_params", "kv_transfer_params must be an object");
  KvTransferParams params;
  Fields fields(json);
  fields.read_bool("do_remote_decode", params.do_remote_decode);
  fields.read_bool("do_remote_prefill", params.do_remote_prefill);
  fields.read_mode("transfer_mode", params.mode);
  fields.read_text("remote_engine_id", params.remote_engine_id, kMaxIdBytes);
  fields.read_text("remote_request_id", params.remote_request_id, kMaxIdBytes);
  fields.read_text("remote_host", params.remote_host, kMaxHostBytes);
  fields.read_int("remote_port", params.remote_port, 0, kMaxPort);
  fields.read_int("remote_num_tokens", params.remote_num_tokens, 0, kMaxCount);
  fields.read_int("remote_cached_tokens", params.remote_cached_tokens, 0, kMaxCount);
  fields.read_int("tp_size", params.tp_size, 1, 1024);
  fields.read_blocks("remote_block_ids", params.remote_block_ids);
  fields.read_time("remote_blocks_expiry_time", params.remote_blocks_expiry_time);
  fields.read_tokens("prompt_token_ids", params.prompt_token_ids);
  if (fields.error()) return *fields.error();
  drop_brackets(params.remote_host);
  return params;
}

// Every field of vLLM's list is always there, with null for what is not known, because its clients copy them by name.
Json to_json(const KvTransferParams& params) {
  const auto text = [](const std::string& value) { return value.empty() ? Json() : Json(value); };
  Json json = {
      {"do_remote_prefill", params.do_remote_prefill},
      {"do_remote_decode", params.do_remote_decode},
      {"remote_block_ids", params.remote_block_ids.empty() ? Json() : Json(params.remote_block_ids)},
      {"remote_engine_id", text(params.remote_engine_id)},
      {"remote_request_id", text(params.remote_request_id)},
      {"remote_host", text(params.remote_host)},
      {"remote_port", params.remote_port == 0 ? Json() : Json(params.remote_port)},
      {"tp_size", params.tp_size},
      {"remote_num_tokens", params.remote_num_tokens},
      {"remote_blocks_expiry_time",
       params.remote_blocks_expiry_time ? Json(*params.remote_blocks_expiry_time) : Json()},
      {"transfer_mode", params.mode == TransferMode::kPush ? "push" : "pull"},
  };
  if (params.mode == TransferMode::kPush) json["remote_cached_tokens"] = params.remote_cached_tokens;
  if (!params.prompt_token_ids.empty()) json["prompt_token_ids"] = params.prompt_token_ids;
  return json;
}

}  // namespace tandem::transfer
