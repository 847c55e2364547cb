#include "src/base/options_dotted.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

namespace tandem {
namespace {

// An argument that begins with "--": "--name", "--name=value", "--name.field" or "--name.field=value".
struct Split {
  std::string name;
  std::string field;
  std::optional<std::string> value;
};

Split split_argument(const std::string& argument) {
  Split split;
  std::string head = argument.substr(2);
  if (const size_t equals = head.find('='); equals != std::string::npos) {
    split.value = head.substr(equals + 1);
    head.resize(equals);
  }
  if (const size_t dot = head.find('.'); dot != std::string::npos) {
    split.field = head.substr(dot + 1);
    head.resize(dot);
  }
  split.name = head;
  return split;
}

bool is_object_option(Subcommand command, const std::string& name) {
  const Result<const OptionSpec*> spec = find_option(command, name);
  return spec.ok() && (*spec)->type == OptionType::kObject;
}

nlohmann::json read_value(const std::string& text) {
  const nlohmann::json parsed = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  return parsed.is_discarded() ? nlohmann::json(text) : parsed;
}

Status put_field(nlohmann::json& object, const Split& split, const std::string& value) {
  // Names of options have dashes by now, those of fields have none.
  std::string field = split.field;
  std::replace(field.begin(), field.end(), '-', '_');
  if (field.empty() || field.find('.') != std::string::npos) {
    return invalid_argument(split.name, "--{}.{}: give one field, as in --{}.field value", split.name, split.field,
                            split.name);
  }
  if (object.contains(field)) {
    return invalid_argument(split.name, "--{}: '{}' is given twice; leave one out", split.name, field);
  }
  object[field] = read_value(value);
  return {};
}

}  // namespace

Result<std::vector<std::string>> fold_dotted_options(Subcommand command, const std::vector<std::string>& arguments) {
  std::map<std::string, nlohmann::json> folded;  // by name of the option
  for (const std::string& argument : arguments) {
    if (argument.rfind("--", 0) != 0) continue;
    const Split split = split_argument(argument);
    if (!split.field.empty() && is_object_option(command, split.name)) folded[split.name] = nlohmann::json::object();
  }
  if (folded.empty()) return arguments;

  std::vector<std::string> rest;
  std::vector<std::pair<Split, std::string>> fields;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Split split = arguments[i].rfind("--", 0) == 0 ? split_argument(arguments[i]) : Split();
    const auto found = folded.find(split.name);
    if (found == folded.end()) {
      rest.push_back(arguments[i]);
      continue;
    }
    if (!split.value && i + 1 == arguments.size()) {
      return invalid_argument(split.name, "{} has no value; give one behind it", arguments[i]);
    }
    const std::string value = split.value ? *split.value : arguments[++i];
    if (!split.field.empty()) {
      fields.emplace_back(split, value);
      continue;
    }
    const nlohmann::json object = nlohmann::json::parse(value, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object()) {
      return invalid_argument(split.name, "--{} is '{}'; it must be a JSON object", split.name, value);
    }
    if (!found->second.empty()) {
      return invalid_argument(split.name, "--{} is given twice; leave one out", split.name);
    }
    found->second = object;
  }
  for (const auto& [split, value] : fields) TANDEM_TRY(put_field(folded[split.name], split, value));
  for (const auto& [name, object] : folded) {
    rest.push_back("--" + name);
    rest.push_back(object.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  }
  return rest;
}

}  // namespace tandem
