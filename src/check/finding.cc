#include "src/check/finding.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <vector>

namespace tandem::check {
namespace {

using Row = std::array<std::string, 6>;

// Characters, not bytes: "µs" is two of them.
size_t width_of(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

// A value may come from another host; a line break or an escape sequence in it must not reach the terminal.
std::string printable(const std::string& text) {
  std::string out;
  for (const char c : text) out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? ' ' : c;
  return out.empty() ? "-" : out;
}

std::string format_rows(const std::vector<Row>& rows) {
  std::array<size_t, 6> widths{};
  for (const Row& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], width_of(row[i]));
  }
  std::string out;
  for (const Row& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      line += row[i];
      if (i + 1 < row.size()) line += std::string(widths[i] - width_of(row[i]) + 2, ' ');
    }
    out += line + "\n";
  }
  return out;
}

}  // namespace

const char* state_name(State state) {
  switch (state) {
    case State::kOk:
      return "ok";
    case State::kWarn:
      return "warn";
    case State::kError:
      return "error";
  }
  return "?";
}

const char* category_name(Category category) {
  static constexpr std::array<const char*, kNumCategories> kNames = {
      "hosts", "names", "ports", "clocks", "transport", "limits", "processors", "memory", "program", "model"};
  return kNames[static_cast<size_t>(category)];
}

bool has_errors(std::span<const Finding> findings) {
  return std::any_of(findings.begin(), findings.end(), [](const Finding& f) { return f.state == State::kError; });
}

std::string format_findings(std::span<const Finding> findings, bool verbose) {
  std::vector<Row> rows = {{"state", "where", "what", "value", "limit", "remedy"}};
  for (const State state : {State::kError, State::kWarn, State::kOk}) {
    if (state == State::kOk && !verbose) continue;
    for (const Finding& f : findings) {
      if (f.state != state) continue;
      rows.push_back({state_name(state), printable(f.where), printable(f.what), printable(f.value), printable(f.limit),
                      printable(f.remedy)});
    }
  }
  std::string out = rows.size() > 1 ? format_rows(rows) + "\n" : "";
  for (int i = 0; i < kNumCategories; ++i) {
    const Category category = static_cast<Category>(i);
    std::array<int64_t, 3> counts{};
    for (const Finding& f : findings) {
      if (f.category == category) ++counts[static_cast<size_t>(f.state)];
    }
    const int64_t all = counts[0] + counts[1] + counts[2];
    if (all == 0) continue;
    out += fmt::format("{:<11} {} ok", category_name(category), counts[0]);
    if (counts[1] > 0) out += fmt::format(", {} warn", counts[1]);
    if (counts[2] > 0) out += fmt::format(", {} error", counts[2]);
    out += "\n";
  }
  return out;
}

nlohmann::json findings_as_json(std::span<const Finding> findings) {
  nlohmann::json list = nlohmann::json::array();
  for (const Finding& f : findings) {
    list.push_back({{"state", state_name(f.state)},
                    {"category", category_name(f.category)},
                    {"where", f.where},
                    {"what", f.what},
                    {"value", f.value},
                    {"limit", f.limit},
                    {"remedy", f.remedy}});
  }
  return {{"ok", !has_errors(findings)}, {"findings", std::move(list)}};
}

}  // namespace tandem::check
