// The command line, by CLI11 (kept to this file because the header is large). CLI11 only splits words into options;
// values are checked by parse_option_value, so that a file and a command line give the same messages.
#include <yaml-cpp/yaml.h>

#include <CLI/CLI.hpp>
#include <deque>
#include <utility>

#include "src/base/options.h"
#include "src/base/options_dotted.h"
#include "src/base/options_yaml.h"
#include "src/base/version.h"

namespace tandem {
namespace {

struct Binding {
  const OptionSpec* spec;
  CLI::Option* option = nullptr;
  bool flag = false;
  std::vector<std::string> texts;
};

struct BoundCommand {
  const SubcommandInfo* info;
  CLI::App* app;
  std::deque<Binding> bindings;  // a deque: CLI11 keeps pointers into it
};

void bind_option(CLI::App& app, Binding& binding) {
  const OptionSpec& spec = *binding.spec;
  if (spec.type == OptionType::kFlag) {
    binding.option = app.add_flag(fmt::format("--{0},!--no-{0}", spec.name), binding.flag);
  } else {
    const std::string name = spec.positional ? std::string(spec.name) : fmt::format("--{}", spec.name);
    binding.option = app.add_option(name, binding.texts);
    if (spec.type == OptionType::kList) {
      binding.option->expected(1, 1 << 16);
    } else {
      binding.option->expected(1)->allow_extra_args(false);  // else "[1]" would be taken apart as a list
    }
  }
}

// "bench serve" hangs below "bench".
CLI::App* add_command(CLI::App& root, const SubcommandInfo& info) {
  const std::string name = info.name;
  const size_t space = name.find(' ');
  if (space == std::string::npos) return root.add_subcommand(name, info.help);
  const std::string first = name.substr(0, space);
  const std::vector<CLI::App*> same = root.get_subcommands([&](CLI::App* app) { return app->get_name() == first; });
  CLI::App* const parent = same.empty() ? root.add_subcommand(first, "Measure a server.") : same.front();
  parent->require_subcommand(1);
  return parent->add_subcommand(name.substr(space + 1), info.help);
}

// --max_num_seqs is taken as --max-num-seqs, as vLLM does.
std::string with_dashed_name(const std::string& argument) {
  if (argument.rfind("--", 0) != 0) return argument;
  std::string text = argument;
  const size_t end = std::min(text.find('='), text.size());
  std::replace(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(end), '_', '-');
  return text;
}

// The subcommand that the first words name, to look up unknown options before CLI11 sees them.
const SubcommandInfo* named_command(const std::vector<std::string>& arguments) {
  std::string words;
  for (const std::string& argument : arguments) {
    words += words.empty() ? argument : " " + argument;
    for (const SubcommandInfo& info : subcommand_table()) {
      if (words == info.name) return &info;
    }
  }
  return nullptr;
}

// CLI11 would only say that a subcommand is required.
Status check_first_word(const std::string& word) {
  std::vector<std::string> names;
  for (const SubcommandInfo& info : subcommand_table()) {
    const std::string name = info.name;
    names.push_back(name.substr(0, name.find(' ')));
  }
  if (word.rfind('-', 0) == 0 || std::find(names.begin(), names.end(), word) != names.end()) return {};
  const std::string nearest = nearest_name(word, names);
  return invalid_argument("", "unknown subcommand '{}'{}", word,
                          nearest.empty() ? "; see `tandem --help`" : fmt::format("; did you mean '{}'?", nearest));
}

Status check_option_names(const std::vector<std::string>& arguments) {
  const SubcommandInfo* info = named_command(arguments);
  if (info == nullptr) return arguments.empty() ? Status() : check_first_word(arguments.front());
  for (const std::string& argument : arguments) {
    if (argument.rfind("--", 0) != 0 || argument == "--" || argument == "--help") continue;
    const std::string name = argument.substr(2, argument.find('=') - 2);
    if (name.rfind("no-", 0) == 0 && find_option(info->command, name.substr(3)).ok()) continue;
    if (Result<const OptionSpec*> spec = find_option(info->command, name); !spec.ok()) {
      return invalid_argument(name, "tandem {}: {}", info->name, spec.error().message);
    }
  }
  return {};
}

Status take_values(BoundCommand& bound, Options& options) {
  for (Binding& binding : bound.bindings) {
    if (binding.option->count() == 0) continue;
    if (binding.spec->type == OptionType::kFlag) {
      options.set(*binding.spec, OptionValue(binding.flag));
      continue;
    }
    TANDEM_ASSIGN(OptionValue value, parse_option_value(*binding.spec, binding.texts));
    options.set(*binding.spec, std::move(value));
  }
  return {};
}

Status finish_options(Options& options) {
  for (const char* file : {"secret-config", "config"}) {
    if (!find_option(options.command(), file).ok() || options.text(file).empty()) continue;
    const std::string path = options.text(file);
    TANDEM_ASSIGN(const YAML::Node map, load_yaml_file(path));
    TANDEM_TRY(apply_yaml_options(map, path, options));
  }
  bool is_first = true;
  for (const OptionSpec& spec : option_table()) {
    if ((spec.commands & static_cast<uint32_t>(options.command())) == 0 || !spec.positional) continue;
    const char* place = std::exchange(is_first, false) ? "first" : "second";
    if (!options.is_set(spec.name)) {
      return invalid_argument(spec.name, "'{}' is missing; give it as the {} argument", spec.name, place);
    }
  }
  return {};
}

}  // namespace

Result<CommandLine> parse_command_line(const std::vector<std::string>& given) {
  std::vector<std::string> arguments;
  for (const std::string& argument : given) arguments.push_back(with_dashed_name(argument));
  if (const SubcommandInfo* const info = named_command(arguments); info != nullptr) {
    TANDEM_ASSIGN(arguments, fold_dotted_options(info->command, arguments));
  }
  TANDEM_TRY(check_option_names(arguments));

  CLI::App root("Tandem serves mixture-of-experts language models with prefill and decode on separate workers.",
                "tandem");
  root.set_version_flag("--version", std::string("tandem ") + kVersion);
  root.require_subcommand(1);
  root.get_formatter()->column_width(34);
  std::deque<BoundCommand> commands;
  for (const SubcommandInfo& info : subcommand_table()) {
    BoundCommand& bound = commands.emplace_back(BoundCommand{&info, add_command(root, info), {}});
    for (const OptionSpec& spec : option_table()) {
      if ((spec.commands & static_cast<uint32_t>(info.command)) == 0) continue;
      bind_option(*bound.app, bound.bindings.emplace_back(Binding{&spec, nullptr, false, {}}));
    }
  }

  CommandLine line;
  try {
    std::reverse(arguments.begin(), arguments.end());  // CLI11 takes the words last first
    root.parse(arguments);
  } catch (const CLI::CallForHelp&) {
    const SubcommandInfo* const info = named_command(given);
    line.text_to_print = info != nullptr ? options_help(*info) : root.help();
    return line;
  } catch (const CLI::CallForVersion&) {
    line.text_to_print = std::string("tandem ") + kVersion + "\n";
    return line;
  } catch (const CLI::ParseError& error) {
    return invalid_argument("", "{}; see `tandem --help`", error.what());
  }
  for (BoundCommand& bound : commands) {
    if (!bound.app->parsed()) continue;
    line.command = bound.info->command;
    line.options = Options(line.command);
    TANDEM_TRY(take_values(bound, line.options));
  }
  TANDEM_TRY(finish_options(line.options));
  return line;
}

}  // namespace tandem
