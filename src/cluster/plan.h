// From a cluster file to processes: ports, names and command lines. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/cluster/cluster_file.h"

namespace tandem::cluster {

struct ProcessSpec {
  std::string name;  // "prefill", "decode-1", "router"; also the log's name
  std::string role;  // "prefill", "decode", "both", "router"
  std::string host;
  int64_t port = 0;
  int64_t kv_port = 0;                 // 0: none
  std::vector<std::string> arguments;  // of the tandem program

  std::string url() const;
};

struct ClusterPlan {
  std::string model;
  std::vector<ProcessSpec> processes;                               // workers first, the router last
  const ProcessSpec& entrance() const { return processes.back(); }  // where clients connect
};

// Refuses overlapping ports and equal names. `log_level` goes to every process.
Result<ClusterPlan> plan_cluster(const ClusterSpec& spec, const std::string& log_level);

// One line per process: name, role, address, KV port, log.
std::string describe_plan(const ClusterPlan& plan, const std::string& run_dir);

}  // namespace tandem::cluster
