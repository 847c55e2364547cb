#include "src/base/options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

namespace tandem {
namespace {

std::string with_dashes(std::string_view name) {
  std::string text(name);
  std::replace(text.begin(), text.end(), '_', '-');
  return text;
}

std::string number_text(double value) {
  if (std::isinf(value)) return "inf";
  if (value == std::floor(value)) return fmt::format("{:.0f}", value);
  return fmt::format("{}", value);
}

Error bad_value(const OptionSpec& spec, std::string_view text, std::string_view expected) {
  return invalid_argument(spec.name, "--{} is '{}'; it must be {}", spec.name, text, expected);
}

Result<OptionValue> parse_integer(const OptionSpec& spec, const std::string& text) {
  const std::string expected =
      fmt::format("an integer from {} to {}{}", number_text(spec.min), number_text(spec.max),
                  spec.type == OptionType::kBytes ? " (k m g t: powers of 1000; K M G T: powers of 1024)" : "");
  int64_t value = 0;
  const char* const end = text.data() + text.size();
  const std::from_chars_result parsed = std::from_chars(text.data(), end, value);
  if (parsed.ec != std::errc() || parsed.ptr == text.data()) return bad_value(spec, text, expected);
  double scale = 1;
  if (spec.type == OptionType::kBytes && end - parsed.ptr == 1) {
    constexpr std::string_view kDecimal = "kmgt";
    constexpr std::string_view kBinary = "KMGT";
    if (const size_t i = kDecimal.find(*parsed.ptr); i != std::string_view::npos) {
      scale = std::pow(1000.0, static_cast<double>(i + 1));
    } else if (const size_t j = kBinary.find(*parsed.ptr); j != std::string_view::npos) {
      scale = std::pow(1024.0, static_cast<double>(j + 1));
    } else {
      return bad_value(spec, text, expected);
    }
  } else if (parsed.ptr != end) {
    return bad_value(spec, text, expected);
  }
  const double scaled = static_cast<double>(value) * scale;
  if (scaled < spec.min || scaled > spec.max) return bad_value(spec, text, expected);
  return OptionValue(static_cast<int64_t>(scaled));
}

Result<OptionValue> parse_number(const OptionSpec& spec, const std::string& text) {
  const std::string expected = fmt::format("a number from {} to {}", number_text(spec.min), number_text(spec.max));
  double value = 0;
  const char* const end = text.data() + text.size();
  const std::from_chars_result parsed = std::from_chars(text.data(), end, value);
  if (parsed.ec != std::errc() || parsed.ptr != end || std::isnan(value)) return bad_value(spec, text, expected);
  if (value < spec.min || value > spec.max) return bad_value(spec, text, expected);
  return OptionValue(value);
}

Result<OptionValue> parse_choice(const OptionSpec& spec, const std::string& text) {
  std::string_view rest = spec.choices;
  while (!rest.empty()) {
    const size_t bar = rest.find('|');
    if (rest.substr(0, bar) == text) return OptionValue(text);
    rest = bar == std::string_view::npos ? std::string_view() : rest.substr(bar + 1);
  }
  return bad_value(spec, text, fmt::format("one of {}", spec.choices));
}

Result<OptionValue> parse_object(const OptionSpec& spec, const std::string& text) {
  const nlohmann::json parsed = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!parsed.is_object()) return bad_value(spec, text, R"(a JSON object such as '{"kv_role":"kv_both"}')");
  return OptionValue(text);
}

OptionValue default_of(const OptionSpec& spec) {
  if (*spec.default_text != '\0') {
    Result<OptionValue> parsed = parse_option_value(spec, {spec.default_text});
    CHECK(parsed.ok());  // a row of the table contradicts itself
    return std::move(parsed).value();
  }
  switch (spec.type) {
    case OptionType::kInteger:
    case OptionType::kBytes:
      return OptionValue(int64_t{0});
    case OptionType::kNumber:
      return OptionValue(0.0);
    case OptionType::kFlag:
      return OptionValue(false);
    case OptionType::kList:
      return OptionValue(std::vector<std::string>());
    case OptionType::kText:
    case OptionType::kChoice:
    case OptionType::kObject:
      break;
  }
  return OptionValue(std::string());
}

// Levenshtein distance; the texts are option names, so the quadratic table is small.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

nlohmann::json value_as_json(const OptionSpec& spec, const OptionValue& value) {
  if (spec.type == OptionType::kObject) return nlohmann::json::parse(std::get<std::string>(value), nullptr, false);
  if (const double* number = std::get_if<double>(&value); number && std::isinf(*number)) return "inf";
  return std::visit([](const auto& inner) { return nlohmann::json(inner); }, value);
}

}  // namespace

std::string nearest_name(std::string_view text, std::span<const std::string> candidates) {
  std::string nearest;
  size_t best = std::max<size_t>(2, text.size() / 3) + 1;  // farther than a third of the word is no slip of the finger
  for (const std::string& candidate : candidates) {
    const size_t distance = edit_distance(text, candidate);
    if (distance < best) best = distance, nearest = candidate;
  }
  return nearest;
}

Result<const OptionSpec*> find_option(Subcommand command, std::string_view name) {
  const std::string wanted = with_dashes(name);
  std::vector<std::string> names;
  for (const OptionSpec& spec : option_table()) {
    if ((spec.commands & static_cast<uint32_t>(command)) == 0) continue;
    if (wanted == spec.name) return &spec;
    names.emplace_back(spec.name);
  }
  const std::string nearest = nearest_name(wanted, names);
  if (nearest.empty()) return invalid_argument(std::string(name), "unknown option '{}'; --help lists the options", name);
  return invalid_argument(std::string(name), "unknown option '{}'; did you mean '{}'?", name, nearest);
}

Result<OptionValue> parse_option_value(const OptionSpec& spec, const std::vector<std::string>& texts) {
  if (spec.type == OptionType::kList) return OptionValue(texts);
  CHECK_EQ(texts.size(), size_t{1});
  const std::string& text = texts.front();
  switch (spec.type) {
    case OptionType::kInteger:
    case OptionType::kBytes:
      return parse_integer(spec, text);
    case OptionType::kNumber:
      return parse_number(spec, text);
    case OptionType::kChoice:
      return parse_choice(spec, text);
    case OptionType::kObject:
      return parse_object(spec, text);
    case OptionType::kFlag:
      if (text == "true" || text == "false") return OptionValue(text == "true");
      return bad_value(spec, text, "true or false");
    case OptionType::kText:
    case OptionType::kList:
      break;
  }
  return OptionValue(text);
}

std::vector<std::string> option_to_arguments(const OptionSpec& spec, const OptionValue& value) {
  const std::string dashed = fmt::format("--{}", spec.name);
  if (const bool* on = std::get_if<bool>(&value)) return {*on ? dashed : fmt::format("--no-{}", spec.name)};
  if (const int64_t* number = std::get_if<int64_t>(&value)) return {dashed, fmt::format("{}", *number)};
  if (const double* number = std::get_if<double>(&value)) return {dashed, fmt::format("{}", *number)};
  if (const std::string* text = std::get_if<std::string>(&value)) return {dashed, *text};
  std::vector<std::string> arguments = {dashed};
  const std::vector<std::string>& list = std::get<std::vector<std::string>>(value);
  arguments.insert(arguments.end(), list.begin(), list.end());
  return arguments;
}

Options::Options(Subcommand command) : command_(command) {
  for (const OptionSpec& spec : option_table()) {
    if ((spec.commands & static_cast<uint32_t>(command)) == 0) continue;
    const bool is_new = entries_.emplace(spec.name, Entry{&spec, default_of(spec)}).second;
    CHECK(is_new);  // two rows give one subcommand the same name
  }
}

const Options::Entry& Options::entry(std::string_view name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) fail_check(__FILE__, __LINE__, fmt::format("no option '{}' in this subcommand", name));
  return found->second;
}

const std::string& Options::text(std::string_view name) const { return std::get<std::string>(entry(name).value); }
int64_t Options::integer(std::string_view name) const { return std::get<int64_t>(entry(name).value); }
double Options::number(std::string_view name) const { return std::get<double>(entry(name).value); }
bool Options::flag(std::string_view name) const { return std::get<bool>(entry(name).value); }
bool Options::is_set(std::string_view name) const { return entry(name).is_set; }
const std::vector<std::string>& Options::list(std::string_view name) const {
  return std::get<std::vector<std::string>>(entry(name).value);
}

bool Options::is_changed(std::string_view name) const {
  const Entry& found = entry(name);
  return found.value != default_of(*found.spec);
}

std::string Options::as_text(std::string_view name) const {
  const Entry& found = entry(name);
  if (found.spec->secret) return "***";
  if (const std::string* text = std::get_if<std::string>(&found.value)) return *text;
  return value_as_json(*found.spec, found.value).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

void Options::set(const OptionSpec& spec, OptionValue value) {
  Entry& target = const_cast<Entry&>(entry(spec.name));
  CHECK_EQ(target.value.index(), value.index());
  target.value = std::move(value);
  target.is_set = true;
}

std::vector<std::string> Options::set_arguments(std::string_view group,
                                                std::span<const std::string_view> others) const {
  std::vector<std::string> arguments;
  for (const auto& [name, entry] : entries_) {
    if (!entry.is_set || entry.spec->group == group) continue;
    if (std::find(others.begin(), others.end(), name) != others.end()) continue;
    if (entry.spec->positional) {
      arguments.insert(arguments.begin(), std::get<std::string>(entry.value));
      continue;
    }
    for (std::string& word : option_to_arguments(*entry.spec, entry.value)) arguments.push_back(std::move(word));
  }
  return arguments;
}

std::string Options::changed_json() const {
  nlohmann::ordered_json changed = nlohmann::ordered_json::object();
  for (const auto& [name, entry] : entries_) {
    if (!is_changed(name)) continue;
    changed[name] = entry.spec->secret ? nlohmann::json("***") : value_as_json(*entry.spec, entry.value);
  }
  return changed.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace tandem
