// From the plan of a cluster to what has to be examined: hosts, and the ports on each. Pure.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "src/check/finding.h"
#include "src/cluster/plan.h"

namespace tandem::check {

struct Endpoint {
  std::string host;  // as the cluster file has it
  int64_t port = 0;  // 0: any free one, as UCX and ranks behind another endpoint take for their data
  std::string use;   // "decode's kv_port", "a data port"
  bool is_kv = false;
  bool operator==(const Endpoint&) const = default;
};

struct Target {
  std::string host;      // as the cluster file names it; of several names of this machine the first that is no loopback
  bool is_here = false;  // this machine
  std::vector<Endpoint> endpoints;
  std::vector<cluster::ProcessSpec> processes;
};

bool is_loopback(const std::string& host);  // 127.*, ::1, localhost

// In the order of the plan. All names for which `is_here` holds are one target. Where a cluster has several hosts, each
// gets a data port to be tried besides the named ones.
std::vector<Target> list_targets(const cluster::ClusterPlan& plan,
                                 const std::function<bool(const std::string& host)>& is_here);

// Workers at a loopback address beside other hosts, which could not reach them.
std::vector<Finding> judge_addresses(const std::vector<Target>& targets);

}  // namespace tandem::check
