// Option values in YAML: the --config file of a process, and the `options:` maps of a cluster file.
#pragma once

#include <string>

#include "src/base/options.h"

namespace YAML {
class Node;
}

namespace tandem {

// Reads one file; a syntax error names file, line and column. The result is a map (empty for an empty file).
Result<YAML::Node> load_yaml_file(const std::string& path);

// The value of one key. A list is only for kList; a map only for kObject.
Result<OptionValue> yaml_option_value(const OptionSpec& spec, const YAML::Node& node);

// Sets every key of `map` that is not set yet, so a value from the command line stays. `where` is the file's name.
Status apply_yaml_options(const YAML::Node& map, const std::string& where, Options& options);

// "file.yaml:12: " for messages about a node.
std::string yaml_place(const std::string& where, const YAML::Node& node);

}  // namespace tandem
