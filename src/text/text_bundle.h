// The files that say how a model's text works, as strings: read from a model directory, or received over HTTP by a
// router that has no model directory.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/ids.h"
#include "src/base/result.h"

namespace tandem::text {

struct TextBundle {
  // A tokenizer.json of 10^6 entries has 60 MB.
  static constexpr size_t kMaxFileBytes = 256UL << 20;

  std::string tokenizer_json;
  std::string tokenizer_config_json;   // may be empty
  std::string chat_template;           // chat_template.jinja; may be empty: the config's field counts then
  std::string generation_config_json;  // may be empty
  std::string config_json;

  // Reads the files of `directory`. tokenizer.json and config.json must be there. All are checked to be UTF-8.
  static Result<TextBundle> load(const std::filesystem::path& directory);
  // {"tokenizer.json": "…", …}: the file names as keys, the contents as strings; files that are not there are left out.
  std::string to_json() const;
  static Result<TextBundle> from_json(std::string_view json);

  // The ids that end an answer: eos_token_id of config.json and generation_config.json together, each an id or a list.
  // Ascending, without repeats.
  Result<std::vector<TokenId>> read_eos_ids() const;

  bool operator==(const TextBundle&) const = default;
};

}  // namespace tandem::text
