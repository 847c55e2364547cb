// `tandem serve` with several ranks: starts those of this node as processes of their own and keeps them running, brings
// the group together if rank 0 is here, and, unless headless, serves the OpenAI API in front of the ranks.
#pragma once

#include "src/base/options.h"
#include "src/commands/rank_options.h"

namespace tandem::commands {

// Until SIGINT or SIGTERM. Returns the exit code.
int run_node(const Options& options, const NodeConfig& config);

}  // namespace tandem::commands
