#include "src/text/text_bundle.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

namespace tandem::text {
namespace {

using Json = nlohmann::json;

struct File {
  const char* name;
  std::string TextBundle::*content;
  bool required;
};

constexpr std::array<File, 5> kFiles = {{
    {"tokenizer.json", &TextBundle::tokenizer_json, true},
    {"tokenizer_config.json", &TextBundle::tokenizer_config_json, false},
    {"chat_template.jinja", &TextBundle::chat_template, false},
    {"generation_config.json", &TextBundle::generation_config_json, false},
    {"config.json", &TextBundle::config_json, true},
}};

// Offset of the first byte that is not part of well-formed UTF-8, or npos. RFC 3629: no overlong forms, no surrogates.
size_t find_invalid_utf8(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const uint8_t lead = static_cast<uint8_t>(text[at]);
    if (lead < 0x80) {
      ++at;
      continue;
    }
    const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (lead < 0xC2 || lead > 0xF4 || text.size() - at < length) return at;
    const uint8_t second = static_cast<uint8_t>(text[at + 1]);
    const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (second < low || second > high) return at;
    for (size_t i = 2; i < length; ++i) {
      if ((static_cast<uint8_t>(text[at + i]) & 0xC0) != 0x80) return at;
    }
    at += length;
  }
  return std::string_view::npos;
}

Status check_content(const char* name, std::string_view content) {
  if (content.size() > TextBundle::kMaxFileBytes) {
    return make_error(ErrorKind::kDataLoss, "{}: {} bytes, the limit is {}", name, content.size(),
                      TextBundle::kMaxFileBytes);
  }
  const size_t invalid = find_invalid_utf8(content);
  if (invalid != std::string_view::npos) {
    return make_error(ErrorKind::kDataLoss, "{}: not valid UTF-8 at byte {}", name, invalid);
  }
  return {};
}

Result<std::string> read_file(const std::filesystem::path& path, bool required) {
  std::error_code error;
  const uintmax_t size = std::filesystem::file_size(path, error);
  if (error) {
    if (!required && error == std::errc::no_such_file_or_directory) return std::string();
    if (error == std::errc::not_a_directory) {
      return make_error(ErrorKind::kInvalidArgument,
                        "{}: is a file, and a model with text is a folder with {}; give the folder",
                        path.parent_path().string(), path.filename().string());
    }
    return make_error(ErrorKind::kNotFound, "{}: {}; the model directory must have this file", path.string(),
                      error.message());
  }
  if (size > TextBundle::kMaxFileBytes) {
    return make_error(ErrorKind::kDataLoss, "{}: {} bytes, the limit is {}", path.string(), size,
                      TextBundle::kMaxFileBytes);
  }
  std::string content(size, '\0');
  std::ifstream in(path, std::ios::binary);
  in.read(content.data(), static_cast<std::streamsize>(size));
  if (!in || static_cast<uintmax_t>(in.gcount()) != size) {
    return make_error(ErrorKind::kDataLoss, "{}: cannot read its {} bytes", path.string(), size);
  }
  return content;
}

Status add_eos_ids(const char* name, const std::string& json, std::vector<TokenId>& ids) {
  if (json.empty()) return {};
  const Json config = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return make_error(ErrorKind::kDataLoss, "{}: not a JSON object", name);
  const auto found = config.find("eos_token_id");
  if (found == config.end() || found->is_null()) return {};
  const Json list = found->is_array() ? *found : Json::array({*found});
  for (const Json& id : list) {
    const bool fits = id.is_number_unsigned() && id.get<uint64_t>() <= std::numeric_limits<TokenId>::max();
    if (!fits) {
      return make_error(ErrorKind::kDataLoss, "{}: eos_token_id {} is no token id", name,
                        id.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 40));
    }
    ids.push_back(static_cast<TokenId>(id.get<uint64_t>()));
  }
  return {};
}

}  // namespace

Result<TextBundle> TextBundle::load(const std::filesystem::path& directory) {
  TextBundle bundle;
  for (const File& file : kFiles) {
    TANDEM_ASSIGN(bundle.*file.content, read_file(directory / file.name, file.required));
    TANDEM_TRY(check_content(file.name, bundle.*file.content));
  }
  return bundle;
}

std::string TextBundle::to_json() const {
  Json out = Json::object();
  for (const File& file : kFiles) {
    if (!(this->*file.content).empty()) out[file.name] = this->*file.content;
  }
  // Bundles are checked when they are loaded or received; one put together by hand must not throw either.
  return out.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Result<TextBundle> TextBundle::from_json(std::string_view json) {
  const Json in = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (!in.is_object()) return make_error(ErrorKind::kDataLoss, "text bundle: not a JSON object");
  TextBundle bundle;
  for (const File& file : kFiles) {
    const auto found = in.find(file.name);
    if (found == in.end()) {
      if (file.required) return make_error(ErrorKind::kDataLoss, "text bundle: {} is missing", file.name);
      continue;
    }
    if (!found->is_string()) return make_error(ErrorKind::kDataLoss, "text bundle: {} is not a string", file.name);
    bundle.*file.content = found->get_ref<const std::string&>();
    TANDEM_TRY(check_content(file.name, bundle.*file.content));
  }
  return bundle;
}

Result<std::vector<TokenId>> TextBundle::read_eos_ids() const {
  std::vector<TokenId> ids;
  TANDEM_TRY(add_eos_ids("config.json", config_json, ids));
  TANDEM_TRY(add_eos_ids("generation_config.json", generation_config_json, ids));
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

}  // namespace tandem::text
