#include "src/api/served_text.h"

#include <nlohmann/json.hpp>

#include "src/api/request_fields.h"
#include "src/base/clock.h"

namespace tandem::api {

Result<ServedText> make_served_text(ServedModelFacts facts, text::TextBundle bundle) {
  CHECK(!facts.names.empty());
  TANDEM_ASSIGN(text::Tokenizer tokenizer, text::Tokenizer::create(bundle));
  ServedText served;
  Result<text::ChatTemplate> chat_template = text::ChatTemplate::create(bundle, tokenizer);
  if (chat_template.ok()) {
    served.chat_template = std::make_shared<const text::ChatTemplate>(std::move(*chat_template));
  } else if (chat_template.error().kind != ErrorKind::kUnsupported) {
    return chat_template.error();
  }
  served.model.names = std::move(facts.names);
  served.model.root = std::move(facts.root);
  served.model.created = unix_time_s();
  served.model.max_model_len = facts.max_model_len;
  served.model.vocab_size = facts.vocab_size;
  served.model.eos_ids = tokenizer.stop_ids();
  TANDEM_ASSIGN(served.model.defaults, parse_generation_config(bundle.generation_config_json));
  served.tokenizer = std::make_shared<const text::Tokenizer>(std::move(tokenizer));
  served.bundle = std::move(bundle);
  return served;
}

std::string served_text_to_json(const ServedText& served) {
  Json json = {{"served_model_names", served.model.names},
               {"root", served.model.root},
               {"max_model_len", served.model.max_model_len},
               {"vocab_size", served.model.vocab_size},
               {"eos_token_ids", served.model.eos_ids}};
  std::string out = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  out.pop_back();
  return out + ",\"files\":" + served.bundle.to_json() + "}";
}

Result<ServedTextSource> parse_served_text(std::string_view text) {
  TANDEM_ASSIGN(const Json json, parse_strict_json(text, "the text bundle"));
  if (!json.is_object()) return make_error(ErrorKind::kDataLoss, "the text bundle is not a JSON object");
  RequestFields fields(json);
  ServedTextSource source;
  const std::string* root = fields.text("root", 1UL << 16);
  if (root != nullptr) source.facts.root = *root;
  source.facts.max_model_len = fields.integer("max_model_len", 2, INT64_MAX).value_or(0);
  source.facts.vocab_size = fields.integer("vocab_size", 1, INT32_MAX).value_or(0);
  if (const Json* names = fields.array("served_model_names", 1'000)) {
    for (const Json& name : *names) {
      if (!name.is_string())
        return make_error(ErrorKind::kDataLoss, "the text bundle has a model name of another type");
      source.facts.names.push_back(name.get<std::string>());
    }
  }
  const Json* files = fields.object("files");
  if (fields.failed()) return fields.error();
  if (files == nullptr || source.facts.names.empty() || source.facts.max_model_len == 0 ||
      source.facts.vocab_size == 0) {
    return make_error(ErrorKind::kDataLoss,
                      "the text bundle lacks files, served_model_names, max_model_len or vocab_size");
  }
  TANDEM_ASSIGN(source.bundle, text::TextBundle::from_json(files->dump()));
  return source;
}

}  // namespace tandem::api
