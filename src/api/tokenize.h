// The bodies of /tokenize and /detokenize, in vLLM's shapes.
#pragma once

#include "src/api/served_text.h"
#include "src/api/strict_json.h"

namespace tandem::api {

// {"prompt"} or {"messages", …}, with add_special_tokens and return_token_strs
// → {"count", "max_model_len", "tokens", "token_strs"}
Result<Json> tokenize(const Json& body, const ServedText& served);
// {"tokens"} → {"prompt"}
Result<Json> detokenize(const Json& body, const ServedText& served);

// The ids of a conversation. kInvalidArgument of "messages" if the model has no template.
Result<std::vector<TokenId>> encode_chat(const ServedText& served, const ChatPrompt& chat);

}  // namespace tandem::api
