#include "src/commands/serve_text.h"

#include <filesystem>
#include <nlohmann/json.hpp>

#include "src/base/log.h"
#include "src/commands/server_common.h"
#include "src/text/text_bundle.h"

namespace tandem::commands {
namespace {

// Random weights need no trained tokenizer. Where the folder has none, token i is written "ti", so that every id still
// has a text of its own.
text::TextBundle make_dummy_text(const model::ModelConfig& config) {
  nlohmann::json vocabulary;
  for (int64_t id = 0; id < config.vocab_size; ++id) vocabulary["t" + std::to_string(id)] = id;
  text::TextBundle bundle;
  bundle.tokenizer_json = nlohmann::json{{"version", "1.0"},
                                         {"added_tokens", nlohmann::json::array()},
                                         {"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
                                         {"model", {{"type", "WordLevel"}, {"vocab", vocabulary}, {"unk_token", "t0"}}}}
                              .dump();
  bundle.config_json = nlohmann::json{{"eos_token_id", config.generation.eos_token_ids}}.dump();
  return bundle;
}

Result<text::TextBundle> load_text(const std::string& path, const RankConfig& config) {
  const bool has_tokenizer = std::filesystem::exists(std::filesystem::path(path) / "tokenizer.json");
  if (config.load.format != model::LoadFormat::kDummy || has_tokenizer) return text::TextBundle::load(path);
  log_info("serve", "{} has no tokenizer.json: token i is written \"ti\"", path);
  return make_dummy_text(config.model);
}

}  // namespace

Result<api::ServedText> load_served_text(const Options& options, const RankConfig& config) {
  const std::string& path = options.text("model");
  TANDEM_ASSIGN(text::TextBundle bundle, load_text(path, config));
  api::ServedModelFacts facts;
  facts.names = options.list("served-model-name");
  if (facts.names.empty()) facts.names.push_back(default_model_name(path));
  facts.root = path;
  facts.max_model_len = config.load.max_model_len == 0 ? config.model.max_positions : config.load.max_model_len;
  if (facts.max_model_len < 2) {
    return invalid_argument("max-model-len",
                            "--max-model-len is {}, but a prompt and its answer have at least one token each; raise it "
                            "to 2 or more, or leave it out to take config.json's {}",
                            facts.max_model_len, config.model.max_positions);
  }
  facts.vocab_size = config.model.vocab_size;
  TANDEM_ASSIGN(api::ServedText served, api::make_served_text(std::move(facts), std::move(bundle)));
  if (served.tokenizer->vocab_size() > config.model.vocab_size) {
    return invalid_argument("tokenizer.json",
                            "{}/tokenizer.json knows ids up to {}, vocab_size in config.json is {}: the files do not "
                            "belong together",
                            path, served.tokenizer->vocab_size() - 1, config.model.vocab_size);
  }
  return served;
}

}  // namespace tandem::commands
