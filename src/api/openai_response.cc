#include "src/api/openai_response.h"

#include <algorithm>

#include "src/api/json_text.h"

namespace tandem::api {
namespace {

// JSON has no infinities; a token that cannot be chosen is shown with this, as vLLM does.
constexpr float kLeastLogprob = -9999.0F;

void append_ids(std::string& out, std::span<const TokenId> ids) {
  out += '[';
  for (size_t i = 0; i < ids.size(); ++i) {
    if (i > 0) out += ',';
    append_json_number(out, static_cast<int64_t>(ids[i]));
  }
  out += ']';
}

void append_logprob(std::string& out, float logprob) {
  // The negation keeps NaN out as well.
  append_json_number(out, logprob > kLeastLogprob ? logprob : kLeastLogprob);
}

void append_usage(std::string& out, const UsageCounts& usage) {
  fmt::format_to(std::back_inserter(out),
                 ",\"usage\":{{\"prompt_tokens\":{},\"completion_tokens\":{},\"total_tokens\":{},"
                 "\"prompt_tokens_details\":{{\"cached_tokens\":{}}}}}",
                 usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens + usage.completion_tokens,
                 usage.cached_tokens);
}

void append_kv_transfer(std::string& out, std::string_view kv_transfer) {
  if (kv_transfer.empty()) return;
  out += ",\"kv_transfer_params\":";
  out += kv_transfer;
}

void append_stop_reason(std::string& out, const StopReason& reason) {
  out += ",\"stop_reason\":";
  if (const TokenId* id = std::get_if<TokenId>(&reason)) {
    append_json_number(out, static_cast<int64_t>(*id));
  } else if (const std::string* text = std::get_if<std::string>(&reason)) {
    append_json_string(out, *text);
  } else {
    out += "null";
  }
}

}  // namespace

std::string sse_event(std::string_view json) {
  std::string out = "data: ";
  out += json;
  out += "\n\n";
  return out;
}

ResponseWriter::ResponseWriter(const OpenAiRequest& request, const std::string& id, int64_t created,
                               TokenBytes token_bytes)
    : chat_(request.endpoint == Endpoint::kChat),
      logprobs_(request.sampling.num_logprobs >= 0),
      return_token_ids_(request.return_token_ids),
      tokens_as_ids_(request.return_tokens_as_token_ids),
      token_bytes_(std::move(token_bytes)) {
  std::string tail = "\",\"created\":";
  append_json_number(tail, created);
  tail += ",\"model\":";
  append_json_string(tail, request.model);
  std::string head = "{\"id\":";
  append_json_string(head, id);
  head += ",\"object\":\"";
  chunk_head_ = "data: " + head + (chat_ ? "chat.completion.chunk" : "text_completion") + tail;
  whole_head_ = head + (chat_ ? "chat.completion" : "text_completion") + tail;
}

std::string ResponseWriter::role_chunk(int64_t index, std::span<const TokenId> prompt,
                                       const std::optional<UsageCounts>& usage) const {
  std::string out = chunk_head_;
  fmt::format_to(std::back_inserter(out),
                 ",\"choices\":[{{\"index\":{},\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},"
                 "\"logprobs\":null,\"finish_reason\":null}}]",
                 index);
  if (return_token_ids_) {
    out += ",\"prompt_token_ids\":";
    append_ids(out, prompt);
  }
  if (usage) append_usage(out, *usage);
  out += "}\n\n";
  return out;
}

std::string ResponseWriter::chunk(const ChoicePart& part, int64_t& text_offset, const std::optional<UsageCounts>& usage,
                                  std::string_view kv_transfer) const {
  std::string out;
  out.reserve(chunk_head_.size() + part.text.size() + 256);
  out += chunk_head_;
  out += ",\"choices\":[";
  append_choice(out, part, text_offset, /*is_chunk=*/true);
  out += ']';
  if (usage) append_usage(out, *usage);
  append_kv_transfer(out, kv_transfer);
  out += "}\n\n";
  return out;
}

std::string ResponseWriter::bare_chunk(const std::optional<UsageCounts>& usage, std::string_view kv_transfer) const {
  std::string out = chunk_head_ + ",\"choices\":[]";
  if (usage) append_usage(out, *usage);
  append_kv_transfer(out, kv_transfer);
  out += "}\n\n";
  return out;
}

std::string ResponseWriter::whole(std::span<const ChoicePart> parts, const UsageCounts& usage,
                                  std::string_view kv_transfer, std::span<const TokenId> prompt) const {
  std::string out = whole_head_ + ",\"choices\":[";
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i > 0) out += ',';
    int64_t text_offset = 0;
    append_choice(out, parts[i], text_offset, /*is_chunk=*/false);
  }
  out += ']';
  append_usage(out, usage);
  if (chat_ && return_token_ids_) {
    out += ",\"prompt_token_ids\":";
    append_ids(out, prompt);
  }
  append_kv_transfer(out, kv_transfer);
  out += '}';
  return out;
}

void ResponseWriter::append_choice(std::string& out, const ChoicePart& part, int64_t& text_offset,
                                   bool is_chunk) const {
  out += "{\"index\":";
  append_json_number(out, part.index);
  if (!chat_) {
    out += ",\"text\":";
    append_json_string(out, part.text);
  } else {
    out += is_chunk ? ",\"delta\":{\"content\":" : ",\"message\":{\"role\":\"assistant\",\"content\":";
    append_json_string(out, part.text);
    out += '}';
  }
  out += ",\"logprobs\":";
  if (!logprobs_ || (is_chunk && part.tokens.empty())) {
    out += "null";
  } else if (chat_) {
    append_chat_logprobs(out, part.tokens);
  } else {
    append_completion_logprobs(out, part.tokens, text_offset);
  }
  out += ",\"finish_reason\":";
  if (part.finish) {
    append_json_string(out, engine::finish_reason_name(*part.finish));
    append_stop_reason(out, part.stop_reason);
  } else {
    out += "null";
  }
  if (return_token_ids_) {
    out += ",\"token_ids\":[";
    for (size_t i = 0; i < part.tokens.size(); ++i) {
      if (i > 0) out += ',';
      append_json_number(out, static_cast<int64_t>(part.tokens[i].token));
    }
    out += ']';
    if (!chat_ && !part.prompt.empty()) {
      out += ",\"prompt_token_ids\":";
      append_ids(out, part.prompt);
    }
  }
  out += '}';
}

std::string ResponseWriter::token_name(TokenId token) const {
  return tokens_as_ids_ ? fmt::format("token_id:{}", token) : std::string(token_bytes_(token));
}

// Four parallel arrays. The chosen token is in its top_logprobs even if it is not among the best.
void ResponseWriter::append_completion_logprobs(std::string& out, std::span<const engine::GeneratedToken> tokens,
                                                int64_t& text_offset) const {
  std::string offsets, logprobs, names, tops;
  for (const engine::GeneratedToken& token : tokens) {
    const std::string_view comma = offsets.empty() ? "" : ",";
    const std::string name = token_name(token.token);
    (offsets += comma) += std::to_string(text_offset);
    text_offset += count_code_points(name);
    logprobs += comma;
    append_logprob(logprobs, token.logprob);
    names += comma;
    append_json_string(names, name);

    (tops += comma) += '{';
    std::vector<std::string> keys;  // two tokens may look the same; an object must not have a key twice
    const auto add = [&](TokenId id, float logprob) {
      std::string key;
      append_json_string(key, token_name(id));
      if (std::find(keys.begin(), keys.end(), key) != keys.end()) return;
      if (!keys.empty()) tops += ',';
      tops += key;
      tops += ':';
      append_logprob(tops, logprob);
      keys.push_back(std::move(key));
    };
    add(token.token, token.logprob);
    for (const auto& [id, logprob] : token.top_logprobs) add(id, logprob);
    tops += '}';
  }
  fmt::format_to(std::back_inserter(out),
                 "{{\"text_offset\":[{}],\"token_logprobs\":[{}],\"tokens\":[{}],\"top_logprobs\":[{}]}}", offsets,
                 logprobs, names, tops);
}

void ResponseWriter::append_chat_logprobs(std::string& out, std::span<const engine::GeneratedToken> tokens) const {
  out += "{\"content\":[";
  for (size_t i = 0; i < tokens.size(); ++i) {
    out += i == 0 ? "{" : ",{";
    append_chat_token(out, tokens[i].token, tokens[i].logprob);
    out += ",\"top_logprobs\":[";
    for (size_t k = 0; k < tokens[i].top_logprobs.size(); ++k) {
      out += k == 0 ? "{" : ",{";
      append_chat_token(out, tokens[i].top_logprobs[k].first, tokens[i].top_logprobs[k].second);
      out += '}';
    }
    out += "]}";
  }
  out += "]}";
}

void ResponseWriter::append_chat_token(std::string& out, TokenId token, float logprob) const {
  const std::string name = token_name(token);
  out += "\"token\":";
  append_json_string(out, name);
  out += ",\"logprob\":";
  append_logprob(out, logprob);
  out += ",\"bytes\":[";
  for (size_t i = 0; i < name.size(); ++i) {
    if (i > 0) out += ',';
    append_json_number(out, static_cast<int64_t>(static_cast<unsigned char>(name[i])));
  }
  out += ']';
}

}  // namespace tandem::api
