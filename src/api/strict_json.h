// JSON from strangers: what two parsers could read differently is refused. No recursion on input.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string_view>

#include "src/base/result.h"

namespace tandem::api {

// Keeps the order of members, because chat templates print objects.
using Json = nlohmann::ordered_json;

inline constexpr size_t kMaxJsonDepth = 64;
// Values in one document, also those in fields that nobody reads.
inline constexpr size_t kMaxJsonValues = 1'000'000;

// Errors (kInvalidArgument): not JSON, not UTF-8, a byte order mark, NaN or Infinity, numbers beyond a double, equal
// keys in one object, too deep, too many values. `what` begins the message, e.g. "the body".
Result<Json> parse_strict_json(std::string_view text, std::string_view what);

}  // namespace tandem::api
