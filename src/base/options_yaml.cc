#include "src/base/options_yaml.h"

#include <yaml-cpp/yaml.h>

#include <nlohmann/json.hpp>
#include <set>

namespace tandem {
namespace {

// Plain scalars become numbers, booleans and null where they read as such; quoted ones stay text.
nlohmann::json yaml_to_json(const YAML::Node& node) {
  if (node.IsMap()) {
    nlohmann::json object = nlohmann::json::object();
    for (const auto& pair : node) object[pair.first.Scalar()] = yaml_to_json(pair.second);
    return object;
  }
  if (node.IsSequence()) {
    nlohmann::json array = nlohmann::json::array();
    for (const YAML::Node& item : node) array.push_back(yaml_to_json(item));
    return array;
  }
  if (!node.IsScalar()) return nullptr;
  if (node.Tag() != "!") {
    const nlohmann::json parsed = nlohmann::json::parse(node.Scalar(), nullptr, false);
    if (parsed.is_number() || parsed.is_boolean()) return parsed;
  }
  return node.Scalar();
}

Error wrong_shape(const OptionSpec& spec, std::string_view expected) {
  return invalid_argument(spec.name, "'{}' must be {}", spec.name, expected);
}

}  // namespace

std::string yaml_place(const std::string& where, const YAML::Node& node) {
  const YAML::Mark mark = node.Mark();
  return mark.is_null() ? where + ": " : fmt::format("{}:{}: ", where, mark.line + 1);
}

Result<YAML::Node> load_yaml_file(const std::string& path) {
  try {
    YAML::Node root = YAML::LoadFile(path);
    if (root.IsNull()) return YAML::Node(YAML::NodeType::Map);
    if (!root.IsMap()) return invalid_argument("", "{}: must be a map of names to values", path);
    return root;
  } catch (const YAML::BadFile&) {
    return make_error(ErrorKind::kNotFound, "{}: cannot be read; give the path of a YAML file", path);
  } catch (const YAML::Exception& error) {
    return invalid_argument("", "{}:{}:{}: {}", path, error.mark.line + 1, error.mark.column + 1, error.msg);
  }
}

Result<OptionValue> yaml_option_value(const OptionSpec& spec, const YAML::Node& node) {
  if (spec.type == OptionType::kObject && node.IsMap()) return parse_option_value(spec, {yaml_to_json(node).dump()});
  if (spec.type == OptionType::kList && node.IsSequence()) {
    std::vector<std::string> texts;
    for (const YAML::Node& item : node) {
      if (!item.IsScalar()) return wrong_shape(spec, "a list of texts");
      texts.push_back(item.Scalar());
    }
    return parse_option_value(spec, texts);
  }
  if (!node.IsScalar()) return wrong_shape(spec, spec.type == OptionType::kList ? "a list of texts" : "one value");
  return parse_option_value(spec, {node.Scalar()});
}

Status apply_yaml_options(const YAML::Node& map, const std::string& where, Options& options) {
  std::set<std::string> seen;
  for (const auto& pair : map) {
    const std::string place = yaml_place(where, pair.first);
    if (!pair.first.IsScalar()) return invalid_argument("", "{}a key must be the name of an option", place);
    Result<const OptionSpec*> spec = find_option(options.command(), pair.first.Scalar());
    if (!spec.ok()) return invalid_argument(spec.error().param, "{}{}", place, spec.error().message);
    const std::string name = (*spec)->name;
    if (name == "config") return invalid_argument(name, "{}'config' cannot be set in a file", place);
    if (!seen.insert(name).second) return invalid_argument(name, "{}'{}' is given twice", place, name);
    Result<OptionValue> value = yaml_option_value(**spec, pair.second);
    if (!value.ok()) return invalid_argument(value.error().param, "{}{}", place, value.error().message);
    if (!options.is_set(name)) options.set(**spec, std::move(value).value());
  }
  return {};
}

}  // namespace tandem
