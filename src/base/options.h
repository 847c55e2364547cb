// The one table of options. It drives the command line, --help, configuration files, the Markdown reference and the
// echo of changed values at start; a value is checked by the same code wherever it comes from.
// Names are vLLM's where vLLM has the option. Precedence: command line, then --config file, then default.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "src/base/result.h"

namespace tandem {

// Bits, so that one row of the table can belong to several subcommands.
enum class Subcommand : uint32_t {
  kServe = 1,
  kRoute = 2,
  kUp = 4,
  kChat = 8,
  kBenchServe = 16,
  kOptions = 32,
  kBenchKernels = 64,
  kBenchThroughput = 128,
  kBenchLatency = 256,
  kQuantize = 512,
  kSim = 1024,
  kEplb = 2048,
  kBenchRouter = 4096,
  kBenchA2a = 8192,
  kBenchKv = 16384,
  kCheck = 32768,
  kCheckAgent = 65536,
};

struct SubcommandInfo {
  Subcommand command;
  const char* name;  // as typed: "serve", "bench serve"
  const char* help;
};
std::span<const SubcommandInfo> subcommand_table();

enum class OptionType : uint8_t {
  kText,
  kChoice,  // one of `choices`
  kInteger,
  kNumber,  // a real number; "inf" where `max` is infinite
  kBytes,   // an integer with an optional suffix: k m g t = powers of 1000, K M G T = powers of 1024
  kFlag,    // --name and --no-name
  kObject,  // a JSON object, kept as text
  kList,    // one or more texts
};

struct OptionSpec {
  const char* name;   // without dashes
  uint32_t commands;  // bits of Subcommand
  const char* group;
  OptionType type;
  const char* default_text;  // as a user would write it; "" is: unset, 0, false, or no elements
  const char* help;          // one sentence
  double min = 0;            // kInteger, kNumber, kBytes: smallest and largest allowed value
  double max = 0;
  const char* choices = "";  // kChoice: separated by '|'
  bool positional = false;   // required, given without its name on the command line
  bool secret = false;       // not shown in the echo
};
std::span<const OptionSpec> option_table();

// The row of `name` (dashes or underscores) for a subcommand; an unknown name is an error that names the nearest one.
Result<const OptionSpec*> find_option(Subcommand command, std::string_view name);

using OptionValue = std::variant<std::string, int64_t, double, bool, std::vector<std::string>>;

// Checks type, range and choices. One text except for kList; kFlag takes "true" or "false".
Result<OptionValue> parse_option_value(const OptionSpec& spec, const std::vector<std::string>& texts);
// The value as command-line arguments, so that a launcher can hand it on: {"--port", "8000"}, {"--no-x"}.
std::vector<std::string> option_to_arguments(const OptionSpec& spec, const OptionValue& value);

// The values of one subcommand. Asking for a name that the table does not give this subcommand is a bug.
class Options {
 public:
  explicit Options(Subcommand command);

  Subcommand command() const { return command_; }
  const std::string& text(std::string_view name) const;  // kText, kChoice, kObject
  int64_t integer(std::string_view name) const;          // kInteger, kBytes
  double number(std::string_view name) const;
  bool flag(std::string_view name) const;
  const std::vector<std::string>& list(std::string_view name) const;

  // Of any type, as a user would write it; a secret is "***".
  std::string as_text(std::string_view name) const;

  bool is_set(std::string_view name) const;  // by command line or file, even if equal to the default
  bool is_changed(std::string_view name) const;  // has another value than the default
  void set(const OptionSpec& spec, OptionValue value);

  // Those that are set, as command-line arguments, without the options of `group` and those named in `others`.
  std::vector<std::string> set_arguments(std::string_view group, std::span<const std::string_view> others) const;
  // {"port":8001,…}: what differs from the defaults, secrets replaced by "***".
  std::string changed_json() const;

 private:
  struct Entry {
    const OptionSpec* spec;
    OptionValue value;
    bool is_set = false;
  };
  const Entry& entry(std::string_view name) const;
  Subcommand command_;
  std::map<std::string, Entry, std::less<>> entries_;
};

struct CommandLine {
  Subcommand command = Subcommand::kOptions;
  Options options{Subcommand::kOptions};
  std::string text_to_print;  // not empty for --help and --version: print it and exit with 0
};

// `arguments` without the program's name. Reads the --config file if one is named. Errors are one line for the user.
Result<CommandLine> parse_command_line(const std::vector<std::string>& arguments);

// What --help prints for one subcommand: its options by group, wrapped at 100 columns.
std::string options_help(const SubcommandInfo& info);
// The reference of every option as Markdown, one table per subcommand.
std::string options_as_markdown();
// Which values an option takes: "a|b", "1 … 65535", "JSON object".
std::string option_values(const OptionSpec& spec);

// The candidate with the smallest edit distance to `text`; "" if none is near enough to be a slip.
std::string nearest_name(std::string_view text, std::span<const std::string> candidates);

}  // namespace tandem
