// What a check found: one line each, and how they are printed. Pure.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>

namespace tandem::check {

enum class State : uint8_t {
  kOk,
  kWarn,   // works, but worse than it could, or could not be told
  kError,  // the cluster will not start or not work
};
const char* state_name(State state);  // "ok", "warn", "error"

enum class Category : uint8_t {
  kHosts,
  kNames,
  kPorts,
  kClocks,
  kTransport,
  kLimits,
  kProcessors,
  kMemory,
  kProgram,
  kModel
};
inline constexpr int kNumCategories = 10;
const char* category_name(Category category);  // "hosts", "names", …

struct Finding {
  State state = State::kOk;
  Category category = Category::kHosts;
  std::string where;   // a host, "a -> b", or a process
  std::string what;    // what was looked at
  std::string value;   // what it is
  std::string limit;   // what it should be; "" if there is nothing to compare with
  std::string remedy;  // "" if nothing has to be done
  bool operator==(const Finding&) const = default;
};

bool has_errors(std::span<const Finding> findings);

// A table of the findings that are not ok, or of all if `verbose`, errors first; then one line per category that says
// how many were looked at.
std::string format_findings(std::span<const Finding> findings, bool verbose);

// {"ok": false, "findings": [{"state": …, "category": …, "where": …, "what": …, "value": …, "limit": …, "remedy": …}]}
nlohmann::json findings_as_json(std::span<const Finding> findings);

}  // namespace tandem::check
