#include "src/api/tokenize.h"

#include <limits>
#include <nlohmann/json.hpp>

#include "src/api/request_fields.h"

namespace tandem::api {
namespace {

Result<std::vector<TokenId>> read_tokens(RequestFields& fields, const Json& body, const ServedText& served,
                                         const text::EncodeLimits& limits) {
  const std::string* prompt = fields.text("prompt", std::numeric_limits<size_t>::max());
  const Json* messages = fields.find("messages");
  const std::optional<bool> add_special_tokens = fields.boolean("add_special_tokens");
  if (fields.failed()) return fields.error();
  if (prompt != nullptr && messages != nullptr) {
    return field_error("messages", "invalid_value", "give either 'prompt' or 'messages', not both");
  }
  if (messages != nullptr) {
    TANDEM_ASSIGN(const ChatPrompt chat, parse_chat_prompt(body));
    return encode_chat(served, chat, limits);
  }
  if (prompt == nullptr) {
    return field_error("prompt", "missing_required_parameter", "you must give a 'prompt' or 'messages'");
  }
  return served.tokenizer->encode(*prompt, add_special_tokens.value_or(true), limits);
}

}  // namespace

Result<std::vector<TokenId>> encode_chat(const ServedText& served, const ChatPrompt& chat,
                                         const text::EncodeLimits& limits) {
  if (served.chat_template == nullptr) {
    return field_error("messages", "unsupported_parameter",
                       "this model has no chat template; use /v1/completions with a prompt");
  }
  TANDEM_ASSIGN(text::EncodedChat encoded,
                served.chat_template->encode({.messages = chat.messages,
                                              .kwargs = chat.template_kwargs,
                                              .add_generation_prompt = chat.add_generation_prompt,
                                              .continue_final_message = chat.continue_final_message},
                                             limits));
  return std::move(encoded.ids);
}

Result<Json> tokenize(const Json& body, const ServedText& served, const std::atomic<bool>* stop) {
  TANDEM_TRY(check_model_name(body, served.model, /*required=*/false));
  RequestFields fields(body);
  const bool with_strings = fields.boolean("return_token_strs").value_or(false);
  TANDEM_ASSIGN(const std::vector<TokenId> tokens, read_tokens(fields, body, served, {.stop = stop}));
  Json out = {{"count", tokens.size()}, {"max_model_len", served.model.max_model_len}, {"tokens", tokens}};
  out["token_strs"] = nullptr;
  if (with_strings) {
    out["token_strs"] = Json::array();
    for (const TokenId token : tokens) out["token_strs"].push_back(served.tokenizer->token_text(token));
  }
  return out;
}

Result<Json> detokenize(const Json& body, const ServedText& served, const std::atomic<bool>* /*stop*/) {
  TANDEM_TRY(check_model_name(body, served.model, /*required=*/false));
  RequestFields fields(body);
  const Json* tokens = fields.find("tokens");
  if (tokens == nullptr) return field_error("tokens", "missing_required_parameter", "you must give 'tokens'");
  TANDEM_ASSIGN(const std::vector<TokenId> ids, parse_token_ids(*tokens, served.model, "tokens"));
  return Json{{"prompt", served.tokenizer->decode(ids, /*skip_special_tokens=*/false)}};
}

}  // namespace tandem::api
