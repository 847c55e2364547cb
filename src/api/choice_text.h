// The text side of one choice: tokens in, text out, until a stop string ends it.
#pragma once

#include <optional>
#include <string>

#include "src/api/openai_request.h"
#include "src/text/stop_matcher.h"
#include "src/text/stream_decoder.h"

namespace tandem::api {

class ChoiceText {
 public:
  ChoiceText(const text::Tokenizer& tokenizer, const OpenAiRequest& request);

  // Appends to `out` what is certain now. Returns the stop string that ended the text, if one did; nothing may be
  // pushed after that. `may_stop`: enough tokens were generated for stop strings to count.
  std::optional<std::string> push(TokenId token, bool may_stop, std::string& out);
  // No token follows: appends what was held back. An unfinished character may still complete a stop string.
  std::optional<std::string> finish(bool may_stop, std::string& out);

 private:
  const std::vector<std::string>& stops_;  // of the request, which outlives this
  text::StreamDecoder decoder_;
  text::StopMatcher matcher_;
};

}  // namespace tandem::api
