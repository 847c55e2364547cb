#include "src/model/json_fields.h"

#include <sys/stat.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>

namespace tandem::model {
namespace {

using Json = nlohmann::json;

constexpr int kMaxDepth = 32;
constexpr size_t kMaxShownCharacters = 96;

const Json& empty_object() {
  static const Json object = Json::object();
  return object;
}

std::string shown(const Json& value) { return printable(value.dump(-1, ' ', true, Json::error_handler_t::replace)); }

}  // namespace

std::string printable(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (out.size() >= kMaxShownCharacters) return out + "…";
    if (c >= 0x20 && c < 0x7F) {
      out.push_back(c);
    } else {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
  }
  return out;
}

Result<std::string> read_small_file(const std::string& path, int64_t max_bytes) {
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) {
    return make_error(ErrorKind::kNotFound, "{}: cannot be read ({}); give a model folder that holds it", path,
                      std::generic_category().message(errno));
  }
  if (!S_ISREG(info.st_mode)) {
    return make_error(ErrorKind::kInvalidArgument, "{}: is not a regular file; give a model folder", path);
  }
  if (info.st_size > max_bytes) {
    return make_error(ErrorKind::kInvalidArgument, "{}: has {} bytes, at most {} are read; fetch the file again", path,
                      static_cast<int64_t>(info.st_size), max_bytes);
  }
  std::ifstream file(path, std::ios::binary);
  std::string text(static_cast<size_t>(info.st_size), '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(text.size()))) {
    return make_error(ErrorKind::kDataLoss, "{}: reading {} bytes failed; check the file's permissions and the disk",
                      path, text.size());
  }
  return text;
}

Result<Json> parse_json(std::string_view text, const std::string& path) {
  std::vector<std::set<std::string>> keys;  // of every open object
  std::string fault;
  const Json::parser_callback_t watch = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > kMaxDepth && fault.empty()) fault = fmt::format("is nested deeper than {} levels", kMaxDepth);
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second && fault.empty()) {
      fault = fmt::format("has the key \"{}\" twice", printable(value.get<std::string>()));
    }
    return true;
  };
  try {
    Json parsed = Json::parse(text.begin(), text.end(), watch);
    if (fault.empty()) return parsed;
  } catch (const Json::exception& error) {
    fault = fmt::format("is not valid JSON ({})", printable(error.what()));
  }
  return make_error(ErrorKind::kInvalidArgument, "{}: {}; fetch the file again", path, fault);
}

Result<JsonFields> JsonFields::read(const std::string& path, int64_t max_bytes) {
  TANDEM_ASSIGN(const std::string text, read_small_file(path, max_bytes));
  TANDEM_ASSIGN(Json parsed, parse_json(text, path));
  if (!parsed.is_object()) {
    return make_error(ErrorKind::kInvalidArgument, "{}: holds {}, must be a JSON object; fetch the file again", path,
                      parsed.type_name());
  }
  std::shared_ptr<SharedData> shared = std::make_shared<SharedData>();
  shared->path = path;
  shared->root = std::make_shared<const Json>(std::move(parsed));
  const Json* root = shared->root.get();
  return JsonFields(std::move(shared), root, "");
}

const Json* JsonFields::find(std::string_view key) const {
  const Json::const_iterator it = node_->find(std::string(key));
  return it == node_->end() || it->is_null() ? nullptr : &*it;
}

std::string JsonFields::canonical_text(std::span<const std::string_view> without) const {
  Json kept = *node_;
  for (const std::string_view key : without) kept.erase(std::string(key));
  return kept.dump();
}

bool JsonFields::has(std::string_view key) const { return find(key) != nullptr; }

void JsonFields::fail(std::string_view key, std::string_view problem) {
  if (!shared_->status.ok()) return;
  const Json* value = find(key);
  const std::string text = value == nullptr ? "missing" : shown(*value);
  Error error = make_error(ErrorKind::kInvalidArgument, "{}: {}{} is {}, {}", shared_->path, prefix_, printable(key),
                           text, problem);
  error.param = prefix_ + std::string(key);
  shared_->status = std::move(error);
}

Status JsonFields::status() const { return shared_->status; }

int64_t JsonFields::checked_integer(std::string_view key, const Json& value, int64_t min, int64_t max) {
  const bool fits = value.is_number_integer() &&
                    !(value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX));
  if (fits && value.get<int64_t>() >= min && value.get<int64_t>() <= max) return value.get<int64_t>();
  fail(key, fmt::format("must be an integer from {} to {}; correct the file or fetch it again", min, max));
  return min;
}

int64_t JsonFields::integer(std::string_view key, int64_t min, int64_t max) {
  const Json* value = find(key);
  return checked_integer(key, value == nullptr ? empty_object() : *value, min, max);
}

int64_t JsonFields::integer_or(std::string_view key, int64_t fallback, int64_t min, int64_t max) {
  const Json* value = find(key);
  return value == nullptr ? fallback : checked_integer(key, *value, min, max);
}

double JsonFields::number(std::string_view key, double min, double max) {
  const Json* value = find(key);
  if (value != nullptr && value->is_number()) {
    const double number = value->get<double>();
    if (std::isfinite(number) && number >= min && number <= max) return number;
  }
  fail(key, fmt::format("must be a number from {} to {}; correct the file or fetch it again", min, max));
  return min;
}

double JsonFields::number_or(std::string_view key, double fallback, double min, double max) {
  return has(key) ? number(key, min, max) : fallback;
}

bool JsonFields::boolean_or(std::string_view key, bool fallback) {
  const Json* value = find(key);
  if (value == nullptr) return fallback;
  if (value->is_boolean()) return value->get<bool>();
  fail(key, "must be true or false; correct the file or fetch it again");
  return fallback;
}

std::string JsonFields::text_or(std::string_view key, std::string_view fallback) {
  const Json* value = find(key);
  if (value == nullptr) return std::string(fallback);
  if (value->is_string()) return value->get<std::string>();
  fail(key, "must be a string; correct the file or fetch it again");
  return std::string(fallback);
}

std::vector<int64_t> JsonFields::integers(std::string_view key, int64_t min, int64_t max) {
  const Json* value = find(key);
  std::vector<int64_t> numbers;
  if (value == nullptr) return numbers;
  if (!value->is_array()) return {checked_integer(key, *value, min, max)};
  for (const Json& item : *value) numbers.push_back(checked_integer(key, item, min, max));
  return numbers;
}

std::vector<std::string> JsonFields::texts(std::string_view key) {
  const Json* value = find(key);
  std::vector<std::string> strings;
  if (value == nullptr) return strings;
  if (value->is_string()) return {value->get<std::string>()};
  bool valid = value->is_array();
  for (const Json& item : *value) {
    valid = valid && item.is_string();
    if (valid) strings.push_back(item.get<std::string>());
  }
  expect(valid, key, "must be a list of strings; correct the file or fetch it again");
  return strings;
}

std::vector<std::pair<std::string, std::string>> JsonFields::text_items() {
  std::vector<std::pair<std::string, std::string>> items;
  for (const auto& [key, value] : node_->items()) {
    if (value.is_string()) {
      items.emplace_back(key, value.get<std::string>());
    } else {
      fail(key, "must be a string; correct the file or fetch it again");
    }
  }
  return items;
}

std::vector<std::string> JsonFields::keys() const {
  std::vector<std::string> keys;
  for (const auto& [key, value] : node_->items()) keys.push_back(key);
  return keys;
}

JsonFields JsonFields::object(std::string_view key) {
  const Json* value = find(key);
  if (value != nullptr && !value->is_object()) {
    fail(key, "must be an object; correct the file or fetch it again");
    value = nullptr;
  }
  return JsonFields(shared_, value == nullptr ? &empty_object() : value, prefix_ + std::string(key) + ".");
}

}  // namespace tandem::model
