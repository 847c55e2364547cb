// What a front end needs of a model besides a worker: its names and limits, its tokenizer and its chat template. Made
// from a model directory by `tandem serve`, or from what a worker's /tandem/v1/text_bundle says by `tandem route`.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "src/api/openai_request.h"
#include "src/base/result.h"
#include "src/text/chat_template.h"
#include "src/text/text_bundle.h"
#include "src/text/tokenizer.h"

namespace tandem::api {

struct ServedText {
  ServedModel model;
  text::TextBundle bundle;
  std::shared_ptr<const text::Tokenizer> tokenizer;
  std::shared_ptr<const text::ChatTemplate> chat_template;  // null if the model has none
};

struct ServedModelFacts {
  std::vector<std::string> names;  // at least one
  std::string root;
  int64_t max_model_len = 0;
  int64_t vocab_size = 0;  // rows of the embedding
};

// Compiles tokenizer and template, which takes a while for large vocabularies: not for the I/O thread.
Result<ServedText> make_served_text(ServedModelFacts facts, text::TextBundle bundle);

// The body of /tandem/v1/text_bundle and its inverse.
std::string served_text_to_json(const ServedText& served);
struct ServedTextSource {
  ServedModelFacts facts;
  text::TextBundle bundle;
};
Result<ServedTextSource> parse_served_text(std::string_view json);

}  // namespace tandem::api
