// The bodies of /v1/completions and /v1/chat/completions, read and checked. Nothing here touches a tokenizer: prompts
// stay text or ids until prepare() in frontend.cc, so this is a pure function of the JSON and of what is served.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "src/api/strict_json.h"
#include "src/base/ids.h"
#include "src/base/result.h"
#include "src/engine/worker.h"

namespace tandem::api {

enum class Endpoint : uint8_t { kCompletions, kChat };

// Bounds that no option changes.
inline constexpr int64_t kMaxChoices = 1024;  // prompts × n of one request
inline constexpr int64_t kMaxPrompts = 1024;
inline constexpr int64_t kMaxN = 16;
inline constexpr int64_t kMaxFanOutTokens = 4L << 20;  // prompt tokens × n of one request
inline constexpr size_t kMaxStopStrings = 4;
inline constexpr size_t kMaxStopStringBytes = 1024;
inline constexpr size_t kMaxStopTokenIds = 128;
inline constexpr size_t kMaxLogitBiases = 1024;
inline constexpr int64_t kMaxLogprobs = 20;
inline constexpr size_t kMaxCacheSaltBytes = 256;
inline constexpr size_t kMaxMessages = 4096;
// Below this a temperature means greedy: dividing by it would overflow.
inline constexpr double kMinTemperature = 1e-5;

// What a model's generation_config.json says for requests that say nothing.
struct GenerationDefaults {
  std::optional<double> temperature;
  std::optional<double> top_p;
  std::optional<int64_t> top_k;
  std::optional<double> min_p;
  std::optional<double> repetition_penalty;
};
// Fields of other types or out of range are errors that name them; unknown ones are ignored. "" has no defaults.
Result<GenerationDefaults> parse_generation_config(std::string_view text);

struct ServedModel {
  std::vector<std::string> names;  // at least one; the first is shown
  std::string root;                // where the model came from, for /v1/models
  int64_t created = 0;             // Unix time
  int64_t max_model_len = 0;       // prompt plus answer
  int64_t vocab_size = 0;          // ids that may occur in a request
  std::vector<TokenId> eos_ids;
  GenerationDefaults defaults;
};

struct RequestPolicy {
  bool accepts_kv_transfer = false;  // false: kv_transfer_params is refused
  bool accepts_resumed = true;       // false: resume_token_ids is refused
};

using Prompt = std::variant<std::string, std::vector<TokenId>>;

struct ChatPrompt {
  std::string messages = "[]";         // JSON: checked, in the form that templates expect
  std::string template_kwargs = "{}";  // JSON: an object of scalars
  bool add_generation_prompt = true;
  bool continue_final_message = false;
};

struct OpenAiRequest {
  Endpoint endpoint = Endpoint::kCompletions;
  std::string model;               // as the client wrote it; shown in the response
  std::vector<Prompt> prompts;     // completions
  bool add_special_tokens = true;  // completions: BOS and the like before text prompts
  ChatPrompt chat;                 // chat
  int64_t n = 1;

  // max_tokens is not final, and seed is drawn per choice if `seed` is unset: see make_token_requests().
  engine::SamplingParams sampling;
  std::optional<int64_t> max_tokens;
  std::optional<int64_t> seed;
  std::string cache_salt;
  std::optional<transfer::KvTransferParams> kv_transfer;
  std::vector<TokenId> resumed;  // "resume_token_ids": what another worker has generated for this request

  std::vector<std::string> stop;
  bool include_stop_str_in_output = false;
  bool skip_special_tokens = true;
  bool detokenize = true;  // false: no text in the response
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage_stats = false;
  bool return_token_ids = false;
  bool return_tokens_as_token_ids = false;
};

// kNotFound with code "model_not_found" for an unknown model; kInvalidArgument with param and code for the rest.
Result<OpenAiRequest> parse_completion_request(const Json& body, const ServedModel& model, const RequestPolicy& policy);
Result<OpenAiRequest> parse_chat_request(const Json& body, const ServedModel& model, const RequestPolicy& policy);

// Also for /tokenize: "model" if given must be served; "messages" and its companions.
Status check_model_name(const Json& body, const ServedModel& model, bool required);
Result<ChatPrompt> parse_chat_prompt(const Json& body);
// Ids within the vocabulary; `param` names the field.
Result<std::vector<TokenId>> parse_token_ids(const Json& ids, const ServedModel& model, const std::string& param);

// The context's size, and after "but" how it is exceeded; kInvalidArgument with code "context_length_exceeded".
Error context_error(const ServedModel& model, std::string param, std::string_view message);

// One request per choice, prompts in order and n of each: choice i belongs to prompt i / n. Decides max_tokens, seeds
// and external ids ("<id>", or "<id>-<i>" if there are several), and checks lengths against the context.
// With seed s, choice k of each prompt gets s + k.
Result<std::vector<engine::TokenRequest>> make_token_requests(const OpenAiRequest& request,
                                                              std::vector<std::vector<TokenId>> prompts,
                                                              const ServedModel& model, const std::string& external_id,
                                                              int64_t deadline_us);

}  // namespace tandem::api
