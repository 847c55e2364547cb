#include "src/api/choice_text.h"

namespace tandem::api {

// The stop strings have passed stricter limits than the matcher's when the request was parsed.
ChoiceText::ChoiceText(const text::Tokenizer& tokenizer, const OpenAiRequest& request)
    : stops_(request.stop),
      decoder_(tokenizer, {.skip_special_tokens = request.skip_special_tokens, .continues = true}),
      matcher_(text::StopMatcher::create(request.stop, request.include_stop_str_in_output).value()) {
  static_assert(kMaxStopStrings <= text::StopMatcher::kMaxStrings);
  static_assert(kMaxStopStringBytes <= text::StopMatcher::kMaxStringBytes);
}

std::optional<std::string> ChoiceText::push(TokenId token, bool may_stop, std::string& out) {
  const std::optional<size_t> stop = matcher_.push(decoder_.push(token), may_stop, out);
  if (!stop) return std::nullopt;
  return stops_[*stop];
}

std::optional<std::string> ChoiceText::finish(bool may_stop, std::string& out) {
  const std::optional<size_t> stop = matcher_.push(decoder_.finish(), may_stop, out);
  if (stop) return stops_[*stop];
  matcher_.finish(out);
  return std::nullopt;
}

}  // namespace tandem::api
