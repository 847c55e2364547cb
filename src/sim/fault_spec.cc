#include "src/sim/fault_spec.h"

#include <charconv>

namespace tandem::sim {
namespace {

struct Field {
  const char* name;
  double FaultSpec::*rate;
};
constexpr Field kFields[] = {
    {"delay", &FaultSpec::delay},   {"duplicate", &FaultSpec::duplicate}, {"lose", &FaultSpec::lose},
    {"drop", &FaultSpec::drop},     {"damage", &FaultSpec::damage},       {"kill", &FaultSpec::kill},
    {"freeze", &FaultSpec::freeze}, {"partition", &FaultSpec::partition}, {"cancel", &FaultSpec::cancel},
};

Error wrong(std::string_view part) {
  std::string names;
  for (const Field& field : kFields) names += fmt::format("{}{}", names.empty() ? "" : ", ", field.name);
  return invalid_argument("faults",
                          "--faults: '{}' is not 'all', 'none' or NAME=RATE with a name of {} and a rate from 0 to 1",
                          part, names);
}

Status parse_part(std::string_view part, FaultSpec& spec) {
  if (part == "all") {
    spec = all_faults();
    return {};
  }
  if (part == "none") {
    spec = FaultSpec();
    return {};
  }
  const size_t equals = part.find('=');
  if (equals == std::string_view::npos) return wrong(part);
  const std::string_view number = part.substr(equals + 1);
  for (const Field& field : kFields) {
    if (part.substr(0, equals) != field.name) continue;
    double rate = -1;
    const std::from_chars_result parsed = std::from_chars(number.data(), number.data() + number.size(), rate);
    if (parsed.ec != std::errc() || parsed.ptr != number.data() + number.size()) return wrong(part);
    if (!(rate >= 0 && rate <= 1)) return wrong(part);
    spec.*field.rate = rate;
    return {};
  }
  return wrong(part);
}

}  // namespace

bool FaultSpec::disturbs() const {
  return lose > 0 || drop > 0 || damage > 0 || kill > 0 || freeze > 0 || partition > 0;
}

std::string FaultSpec::describe() const {
  std::string text;
  for (const Field& field : kFields) {
    const double rate = this->*field.rate;
    if (rate > 0) text += fmt::format("{}{}={}", text.empty() ? "" : ",", field.name, rate);
  }
  return text.empty() ? "none" : text;
}

FaultSpec all_faults() {
  return {.delay = 0.1,
          .duplicate = 0.02,
          .lose = 0.0005,
          .drop = 0.001,
          .damage = 0.002,
          .kill = 0.01,
          .freeze = 0.01,
          .partition = 0.01,
          .cancel = 0.1};
}

Result<FaultSpec> parse_fault_spec(std::string_view text) {
  FaultSpec spec;
  if (text.empty()) return wrong(text);
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    TANDEM_TRY(parse_part(text.substr(0, comma), spec));
    if (comma + 1 == text.size()) return wrong("");
    text.remove_prefix(std::min(comma + 1, text.size()));
  }
  return spec;
}

}  // namespace tandem::sim
