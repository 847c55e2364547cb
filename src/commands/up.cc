// tandem up: the processes of a cluster file on this host.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "src/base/descriptor_limit.h"
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

// Every process may drain for as long as `up` says, unless the cluster file says otherwise for it. The longest time.
double set_shutdown_timeouts(cluster::ClusterPlan& plan, const Options& options) {
  constexpr const char* kName = "--shutdown-timeout";
  double longest_s = 0;
  for (cluster::ProcessSpec& process : plan.processes) {
    std::vector<std::string>& arguments = process.arguments;
    auto found = std::find(arguments.begin(), arguments.end(), kName);
    if (found == arguments.end()) {
      arguments.insert(arguments.end(), {kName, fmt::format("{}", options.number("shutdown-timeout"))});
      found = arguments.end() - 2;
    }
    longest_s = std::max(longest_s, std::strtod((found + 1)->c_str(), nullptr));  // checked by the option table
  }
  return longest_s;
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
  Result<cluster::ClusterPlan> plan = read_plan(options);
  if (!plan.ok()) {
    std::fprintf(stderr, "%s\n", plan.error().message.c_str());
    return 1;
  }
  const double shutdown_timeout_s = set_shutdown_timeouts(*plan, options);
  std::fputs(cluster::describe_plan(*plan, options.text("run-dir")).c_str(), stdout);
  if (options.flag("dry-run")) {
    for (const cluster::ProcessSpec& process : plan->processes) std::printf("%s\n", command_line(process).c_str());
    return 0;
  }
  std::fflush(stdout);
  raise_descriptor_limit();  // each process says itself if that is not enough for it
  const cluster::LauncherOptions launcher{.program = cluster::kOwnProgram,
                                          .run_dir = options.text("run-dir"),
                                          .shutdown_timeout_s = shutdown_timeout_s,
                                          .is_terminal = ::isatty(STDOUT_FILENO) == 1,
                                          .print = [](const std::string& text) {
                                            std::fputs(text.c_str(), stdout);
                                            std::fflush(stdout);
                                          }};
  return cluster::run_cluster(*plan, launcher);
}

}  // namespace tandem::commands
