// Response bodies of /v1/completions and /v1/chat/completions, whole and in chunks, written straight into strings:
// a chunk is made for every token, so it must cost microseconds.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "src/api/openai_request.h"
#include "src/engine/worker.h"

namespace tandem::api {

// The bytes a token stands for, possibly part of a character; valid until the next call.
using TokenBytes = std::function<std::string_view(TokenId)>;

// Why the field finish_reason is "stop": nothing to tell, a stop token id, or a stop string.
using StopReason = std::variant<std::monostate, TokenId, std::string>;

// What one choice adds: everything it has in a whole response, or what is new in a chunk.
struct ChoicePart {
  int64_t index = 0;
  std::string_view text;
  std::span<const engine::GeneratedToken> tokens;
  std::optional<engine::FinishReason> finish;
  StopReason stop_reason;
  // Completions with return_token_ids: in the first chunk of each choice and in whole responses.
  std::span<const TokenId> prompt;
};

struct UsageCounts {
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  int64_t cached_tokens = 0;
};

class ResponseWriter {
 public:
  ResponseWriter(const OpenAiRequest& request, const std::string& id, int64_t created, TokenBytes token_bytes);

  // Chunks as whole server-sent events, "data: {…}\n\n".
  std::string role_chunk(int64_t index, std::span<const TokenId> prompt, const std::optional<UsageCounts>& usage) const;
  // `kv_transfer` is the JSON of the field, or empty. text_offset: code points that the choice has shown so far; moves.
  std::string chunk(const ChoicePart& part, int64_t& text_offset, const std::optional<UsageCounts>& usage,
                    std::string_view kv_transfer) const;
  // Without choices: the last one of include_usage, or the first one of a reservation.
  std::string bare_chunk(const std::optional<UsageCounts>& usage, std::string_view kv_transfer) const;

  // A whole response. `prompt`: chat with return_token_ids.
  std::string whole(std::span<const ChoicePart> parts, const UsageCounts& usage, std::string_view kv_transfer,
                    std::span<const TokenId> prompt) const;

 private:
  void append_choice(std::string& out, const ChoicePart& part, int64_t& text_offset, bool is_chunk) const;
  void append_completion_logprobs(std::string& out, std::span<const engine::GeneratedToken> tokens,
                                  int64_t& text_offset) const;
  void append_chat_logprobs(std::string& out, std::span<const engine::GeneratedToken> tokens) const;
  void append_chat_token(std::string& out, TokenId token, float logprob) const;
  std::string token_name(TokenId token) const;

  bool chat_;
  bool logprobs_;
  bool return_token_ids_;
  bool tokens_as_ids_;
  TokenBytes token_bytes_;
  std::string chunk_head_;  // up to the first field that changes
  std::string whole_head_;
};

std::string sse_event(std::string_view json);
inline constexpr std::string_view kSseDone = "data: [DONE]\n\n";

}  // namespace tandem::api
