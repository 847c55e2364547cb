// Keeps the processes of a plan running: starts them, shows how far they are, restarts those that die, and stops all.
// If the launcher itself is killed, the kernel kills its children.
#pragma once

#include <functional>
#include <string>

#include "src/cluster/plan.h"

namespace tandem::cluster {

struct LauncherOptions {
  std::string program;                            // started with each process's arguments
  std::string run_dir;                            // <name>.log and <name>.pid of every process
  double shutdown_timeout_s = 0;                  // how long a process may take to end what it has after SIGTERM
  bool is_terminal = false;                       // progress as one line redrawn in place
  std::function<void(const std::string&)> print;  // whole lines, or a "\r…" redraw on a terminal
};

// Runs until SIGINT or SIGTERM (0), a process that fails at start, or one that keeps dying (1). Refuses to start
// anything while a port of the plan is taken. Call it from the main thread: children die with the calling thread.
int run_cluster(const ClusterPlan& plan, const LauncherOptions& options);

}  // namespace tandem::cluster
