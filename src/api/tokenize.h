// The bodies of /tokenize and /detokenize, in vLLM's shapes.
#pragma once

#include <atomic>

#include "src/api/served_text.h"
#include "src/api/strict_json.h"

namespace tandem::api {

// {"prompt"} or {"messages", …}, with add_special_tokens and return_token_strs
// → {"count", "max_model_len", "tokens", "token_strs"}
// However long the text is; `stop` ends it early with kAborted.
Result<Json> tokenize(const Json& body, const ServedText& served, const std::atomic<bool>* stop);
// {"tokens"} → {"prompt"}
Result<Json> detokenize(const Json& body, const ServedText& served, const std::atomic<bool>* stop);

// The ids of a conversation. kInvalidArgument of "messages" if the model has no template; the other errors as
// text::ChatTemplate::encode has them.
Result<std::vector<TokenId>> encode_chat(const ServedText& served, const ChatPrompt& chat,
                                         const text::EncodeLimits& limits);

}  // namespace tandem::api
