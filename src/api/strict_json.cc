#include "src/api/strict_json.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <unordered_set>
#include <vector>

namespace tandem::api {
namespace {

// Builds the document from the parser's events; returning false stops the parser.
class Builder final : public nlohmann::json_sax<Json> {
 public:
  Json root;
  std::string fault;  // what was refused; empty if the text is not JSON at all
  size_t wrong_at = 0;  // byte, from 1 on

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(int64_t value) override { return add(value); }
  bool number_unsigned(uint64_t value) override { return add(value); }
  bool number_float(double value, const std::string&) override { return add(value); }
  bool string(std::string& value) override { return add(std::move(value)); }
  bool binary(Json::binary_t&) override { return false; }
  bool start_object(size_t) override { return open(Json::object()); }
  bool key(std::string& name) override {
    if (!is_new_key(open_.back(), name)) {
      fault = "has a key twice in one object";
      return false;
    }
    key_ = std::move(name);
    return true;
  }
  bool end_object() override { return close(); }
  bool start_array(size_t) override { return open(Json::array()); }
  bool end_array() override { return close(); }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    wrong_at = position;
    return false;
  }

 private:
  struct Level {
    Json* value;
    std::unordered_set<std::string> keys;  // of an object with many members
  };

  // Few members are searched one by one, which costs less than keeping a set of them.
  static bool is_new_key(Level& level, const std::string& name) {
    constexpr size_t kFewMembers = 32;
    const auto& members = level.value->get_ref<const Json::object_t&>();
    if (members.size() < kFewMembers) {
      return std::none_of(members.begin(), members.end(), [&](const auto& member) { return member.first == name; });
    }
    if (level.keys.empty()) {
      for (const auto& member : members) level.keys.insert(member.first);
    }
    return level.keys.insert(name).second;
  }

  bool add(Json value) { return place(std::move(value)) != nullptr; }

  // Pointers into a parent stay valid: a parent does not grow while its child is open.
  Json* place(Json value) {
    if (++num_values_ > kMaxJsonValues) {
      fault = fmt::format("has more than {} values, which is the limit; send less in one request", kMaxJsonValues);
      return nullptr;
    }
    if (open_.empty()) {
      root = std::move(value);
      return &root;
    }
    Json& parent = *open_.back().value;
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    // Past the map's own insertion, which searches the whole object; `keys` has made sure that the key is new.
    auto& members = parent.get_ref<Json::object_t&>();
    members.Json::object_t::Container::emplace_back(std::move(key_), std::move(value));
    return &members.back().second;
  }

  bool open(Json value) {
    if (open_.size() >= kMaxJsonDepth) {
      fault = fmt::format("is nested more than {} levels deep, which is the limit", kMaxJsonDepth);
      return false;
    }
    Json* placed = place(std::move(value));
    if (placed == nullptr) return false;
    open_.push_back({placed, {}});
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  std::vector<Level> open_;
  std::string key_;
  size_t num_values_ = 0;
};

}  // namespace

Result<Json> parse_strict_json(std::string_view text, std::string_view what) {
  Builder builder;
  // The parser would take a NUL for the end of the text, and skip a byte order mark.
  const bool has_nul = text.find('\0') != std::string_view::npos;
  const bool has_mark = text.starts_with("\xEF\xBB\xBF");
  if (has_nul || has_mark || !Json::sax_parse(text, &builder)) {
    if (!builder.fault.empty()) return invalid_argument("", "{} {}", what, builder.fault);
    if (has_mark) return invalid_argument("", "could not parse the JSON of {}: it begins with a byte order mark", what);
    return invalid_argument("", "could not parse the JSON of {}: it is wrong at byte {}", what,
                            has_nul ? text.find('\0') + 1 : builder.wrong_at);
  }
  return std::move(builder.root);
}

}  // namespace tandem::api
