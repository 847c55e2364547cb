// tandem up: the processes of a cluster file on this host.
#include <unistd.h>

#include <cstdio>

#include "src/cluster/launcher.h"
#include "src/cluster/process.h"
#include "src/commands/commands.h"

namespace tandem::commands {
namespace {

Result<cluster::ClusterPlan> read_plan(const Options& options) {
  TANDEM_ASSIGN(const cluster::ClusterSpec spec, cluster::load_cluster_file(options.text("cluster")));
  if (!options.flag("dry-run")) TANDEM_TRY(cluster::check_startable_here(spec));
  return cluster::plan_cluster(spec, options.text("log-level"));
}

// As a shell would need it, for --dry-run.
std::string command_line(const cluster::ProcessSpec& process) {
  std::string line = "tandem";
  for (const std::string& argument : process.arguments) {
    const bool is_plain = argument.find_first_of(" {}[]\"'$*;&|<>()") == std::string::npos && !argument.empty();
    line += is_plain ? " " + argument : " '" + argument + "'";
  }
  return line;
}

}  // namespace

int run_up(const Options& options) {
  const Result<cluster::ClusterPlan> plan = read_plan(options);
  if (!plan.ok()) {
    std::fprintf(stderr, "%s\n", plan.error().message.c_str());
    return 1;
  }
  std::fputs(cluster::describe_plan(*plan, options.text("run-dir")).c_str(), stdout);
  if (options.flag("dry-run")) {
    for (const cluster::ProcessSpec& process : plan->processes) std::printf("%s\n", command_line(process).c_str());
    return 0;
  }
  std::fflush(stdout);
  const cluster::LauncherOptions launcher{.program = cluster::kOwnProgram,
                                          .run_dir = options.text("run-dir"),
                                          .is_terminal = ::isatty(STDOUT_FILENO) == 1,
                                          .print = [](const std::string& text) {
                                            std::fputs(text.c_str(), stdout);
                                            std::fflush(stdout);
                                          }};
  return cluster::run_cluster(*plan, launcher);
}

}  // namespace tandem::commands
