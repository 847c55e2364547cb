// What the readers of loads and placements share: files from elsewhere, of which nothing is believed.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "src/base/result.h"

namespace tandem::eplb {

inline constexpr int64_t kFileVersion = 1;

// Where a fault lies: a file and, if not 0, a line of it.
struct Place {
  const std::string& file;
  int64_t line = 0;

  template <typename... Args>
  Error fault(fmt::format_string<Args...> format, Args&&... args) const {
    const std::string where = line == 0 ? file : fmt::format("{}:{}", file, line);
    return make_error(ErrorKind::kDataLoss, "{}: {}", where, fmt::format(format, std::forward<Args>(args)...));
  }
};

Result<nlohmann::json> parse_object(const std::string& text, const Place& place);
// `format` and version must be ours.
Status check_format(const nlohmann::json& json, const char* format, const Place& place);
bool is_integer_in(const nlohmann::json& value, int64_t min, int64_t max);
Result<int64_t> take_count(const nlohmann::json& json, const char* field, int64_t min, int64_t max, const Place& place);
// "layers": ascending indices of layers in a model.
Result<std::vector<int64_t>> take_layers(const nlohmann::json& json, const Place& place);

}  // namespace tandem::eplb
