#include "src/text/chat_template.h"

#include "src/text/textcore_call.h"

namespace tandem::text {
namespace {

using internal::Bytes;
using internal::Ids;
using internal::to_slice;

tc_chat_request to_c_request(const ChatRequest& request) {
  return {to_slice(request.messages), to_slice(request.tools), to_slice(request.kwargs), request.add_generation_prompt,
          request.continue_final_message};
}

// Faults of the request begin with the name of the field, other messages are the template's.
std::string find_param(std::string_view message) {
  for (const std::string_view field : {"tools", "chat_template_kwargs", "continue_final_message"}) {
    if (message.starts_with(field) && message.substr(field.size()).starts_with(":")) return std::string(field);
  }
  return "messages";
}

}  // namespace

void ChatTemplate::Free::operator()(tc_template* chat) const { tc_template_free(chat); }

Result<ChatTemplate> ChatTemplate::create(const TextBundle& bundle, const Tokenizer& tokenizer) {
  tc_template* handle = nullptr;
  Bytes error;
  const int32_t status = tc_template_new(tokenizer.handle(), to_slice(bundle.tokenizer_config_json),
                                         to_slice(bundle.chat_template), &handle, error.out());
  if (status != TC_OK) return internal::to_error(status, error, "");
  if (handle == nullptr) {
    return make_error(ErrorKind::kUnsupported,
                      "the model has no chat template; use /v1/completions, or add chat_template.jinja to the model");
  }
  ChatTemplate chat;
  chat.handle_.reset(handle);
  return chat;
}

Result<std::string> ChatTemplate::render(const ChatRequest& request) const {
  const tc_chat_request c_request = to_c_request(request);
  Bytes text;
  Bytes error;
  const int32_t status = tc_template_render(handle_.get(), &c_request, text.out(), error.out());
  if (status != TC_OK) return internal::to_error(status, error, find_param(error.view()));
  return std::string(text.view());
}

Result<EncodedChat> ChatTemplate::encode(const ChatRequest& request, const EncodeLimits& limits) const {
  const tc_chat_request c_request = to_c_request(request);
  Ids ids;
  Bytes text;
  Bytes error;
  const tc_limits bounds = internal::to_c_limits(limits);
  const int32_t status = tc_template_encode(handle_.get(), &c_request, &bounds, ids.out(), text.out(), error.out());
  if (status != TC_OK) return internal::to_error(status, error, find_param(error.view()));
  return EncodedChat{ids.take(), std::string(text.view())};
}

}  // namespace tandem::text
