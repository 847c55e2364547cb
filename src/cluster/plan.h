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
  int64_t port = 0;        // 0: none, on a node whose ranks are served by another one's endpoint
  int64_t kv_port = 0;     // 0: none; of the first rank of all, the others follow
  int64_t rpc_port = 0;    // where ranks of several nodes meet, on the node of rank 0; 0: none
  int64_t first_rank = 0;  // of those that this process starts
  int64_t num_ranks = 1;
  std::vector<std::string> arguments;  // of the tandem program

  std::string url() const;
  bool has_endpoint() const { return port > 0; }
};

// A port that a process listens on once it runs.
struct PortUse {
  int64_t port = 0;
  std::string what;  // "port", "kv_port", "kv_port of rank 1", "data-parallel-rpc-port"
  bool is_kv = false;
};
std::vector<PortUse> list_ports(const ProcessSpec& process);

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
