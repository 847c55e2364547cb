// Typed, range-checked reading of a JSON file that comes from outside. The first fault is kept and every later read
// returns its fallback, so that a parser reads as a plain list of fields and checks status() once at its end.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/base/result.h"

namespace tandem::model {

// Text of a foreign file made fit for one line of a message: control and non-ASCII bytes escaped, cut to 96 characters.
std::string printable(std::string_view text);

// The whole of a regular file of at most `max_bytes`.
Result<std::string> read_small_file(const std::string& path, int64_t max_bytes);

// Refuses what is not valid JSON, duplicate keys, and nesting deeper than 32.
Result<nlohmann::json> parse_json(std::string_view text, const std::string& path);

class JsonFields {
 public:
  // The top-level object of a file. `path` is named in every message.
  static Result<JsonFields> read(const std::string& path, int64_t max_bytes);

  const std::string& path() const { return shared_->path; }
  // The object as text with sorted keys, without some of its own keys.
  std::string canonical_text(std::span<const std::string_view> without) const;

  // True if the key is present and not null. The readers below treat null as absent too.
  bool has(std::string_view key) const;

  // Required values: absence is a fault. Integers and numbers must lie in [min, max].
  int64_t integer(std::string_view key, int64_t min, int64_t max);
  double number(std::string_view key, double min, double max);
  // Optional values.
  int64_t integer_or(std::string_view key, int64_t fallback, int64_t min, int64_t max);
  double number_or(std::string_view key, double fallback, double min, double max);
  bool boolean_or(std::string_view key, bool fallback);
  std::string text_or(std::string_view key, std::string_view fallback);
  // A list, or a single value standing for a list of one; empty when absent.
  std::vector<int64_t> integers(std::string_view key, int64_t min, int64_t max);
  std::vector<std::string> texts(std::string_view key);
  // All keys of this object with their values, which must be strings, in the order of the keys.
  std::vector<std::pair<std::string, std::string>> text_items();
  // All keys of this object, ascending.
  std::vector<std::string> keys() const;
  // A nested object; an empty one when absent.
  JsonFields object(std::string_view key);

  // Records a fault of `key`: "<file>: <key> is <value>, <problem>".
  void fail(std::string_view key, std::string_view problem);
  // Unless the condition holds.
  void expect(bool condition, std::string_view key, std::string_view problem) {
    if (!condition) fail(key, problem);
  }

  Status status() const;

 private:
  struct SharedData {
    std::string path;
    std::shared_ptr<const nlohmann::json> root;
    Status status;
  };
  JsonFields(std::shared_ptr<SharedData> shared, const nlohmann::json* node, std::string prefix)
      : shared_(std::move(shared)), node_(node), prefix_(std::move(prefix)) {}
  const nlohmann::json* find(std::string_view key) const;
  int64_t checked_integer(std::string_view key, const nlohmann::json& value, int64_t min, int64_t max);

  std::shared_ptr<SharedData> shared_;
  const nlohmann::json* node_;
  std::string prefix_;  // "rope_scaling." inside a nested object
};

}  // namespace tandem::model
