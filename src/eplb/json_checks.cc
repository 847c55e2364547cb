#include "src/eplb/json_checks.h"

#include <algorithm>

#include "src/eplb/expert_load.h"

namespace tandem::eplb {

namespace {

// Part of a file for a message: one line, whatever the file holds.
std::string excerpt(std::string_view text) {
  std::string shown(text);
  std::replace_if(
      shown.begin(), shown.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return shown;
}

}  // namespace

Result<nlohmann::json> parse_object(const std::string& text, const Place& place) {
  try {
    nlohmann::json json = nlohmann::json::parse(text);
    if (json.is_object()) return json;
  } catch (const nlohmann::json::parse_error& error) {
    const size_t end = std::min(error.byte, text.size());
    const size_t begin = end - std::min<size_t>(end, 20);
    return place.fault("not valid JSON at character {}, after '{}'", error.byte,
                       excerpt(text.substr(begin, end - begin)));
  }
  return place.fault("not a JSON object: '{}{}'", excerpt(text.substr(0, 40)), text.size() > 40 ? "…" : "");
}

Status check_format(const nlohmann::json& json, const char* format, const Place& place) {
  const auto found = json.find("format");
  if (found == json.end() || *found != format) {
    return place.fault("\"format\" is {}; it must be \"{}\"", found == json.end() ? "missing" : found->dump(), format);
  }
  const auto version = json.find("version");
  if (version != json.end() && *version == kFileVersion) return {};
  return place.fault("\"version\" is {}; this program reads {}", version == json.end() ? "missing" : version->dump(),
                     kFileVersion);
}

bool is_integer_in(const nlohmann::json& value, int64_t min, int64_t max) {
  if (!value.is_number_integer()) return false;
  if (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) return false;
  return value.get<int64_t>() >= min && value.get<int64_t>() <= max;
}

Result<int64_t> take_count(const nlohmann::json& json, const char* field, int64_t min, int64_t max,
                           const Place& place) {
  const auto found = json.find(field);
  if (found != json.end() && is_integer_in(*found, min, max)) return found->get<int64_t>();
  return place.fault("\"{}\" is {}; it must be an integer from {} to {}", field,
                     found == json.end() ? "missing" : found->dump(), min, max);
}

Result<std::vector<int64_t>> take_layers(const nlohmann::json& json, const Place& place) {
  const auto found = json.find("layers");
  if (found == json.end() || !found->is_array() || found->empty() || std::ssize(*found) > kMaxLayers) {
    return place.fault("\"layers\" must be a list of 1 to {} layers", kMaxLayers);
  }
  std::vector<int64_t> layers;
  for (const nlohmann::json& layer : *found) {
    if (!is_integer_in(layer, layers.empty() ? 0 : layers.back() + 1, 1 << 20)) {
      return place.fault("\"layers\" has {}; they must be ascending indices from 0", layer.dump());
    }
    layers.push_back(layer.get<int64_t>());
  }
  return layers;
}

}  // namespace tandem::eplb
