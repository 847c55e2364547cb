// tandem options: the reference of every option, from the table.
#include <cstdio>

#include "src/commands/commands.h"

namespace tandem::commands {

int run_options(const Options& options) {
  if (options.flag("markdown")) {
    std::fputs(options_as_markdown().c_str(), stdout);
    return 0;
  }
  for (const SubcommandInfo& info : subcommand_table()) std::printf("%s\n", options_help(info).c_str());
  return 0;
}

}  // namespace tandem::commands
