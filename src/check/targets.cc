#include "src/check/targets.h"

#include <fmt/format.h>

#include <algorithm>

namespace tandem::check {

bool is_loopback(const std::string& host) { return host.rfind("127.", 0) == 0 || host == "::1" || host == "localhost"; }

std::vector<Target> list_targets(const cluster::ClusterPlan& plan,
                                 const std::function<bool(const std::string& host)>& is_here) {
  std::vector<Target> targets;
  for (const cluster::ProcessSpec& process : plan.processes) {
    const bool here = is_here(process.host);
    auto target = std::find_if(targets.begin(), targets.end(), [&](const Target& known) {
      return (here && known.is_here) || known.host == process.host;
    });
    if (target == targets.end()) {
      targets.push_back({process.host, here, {}, {}});
      target = targets.end() - 1;
    }
    if (is_loopback(target->host)) target->host = process.host;
    for (const cluster::PortUse& used : cluster::list_ports(process)) {
      target->endpoints.push_back(
          {process.host, used.port, fmt::format("{}'s {}", process.name, used.what), used.is_kv});
    }
    target->processes.push_back(process);
  }
  if (targets.size() > 1) {
    for (Target& target : targets) {
      if (!is_loopback(target.host)) target.endpoints.push_back({target.host, 0, "a data port", false});
    }
  }
  return targets;
}

std::vector<Finding> judge_addresses(const std::vector<Target>& targets) {
  std::vector<Finding> findings;
  if (targets.size() < 2) return findings;
  for (const Target& target : targets) {
    for (const cluster::ProcessSpec& process : target.processes) {
      if (process.role == "router" || !is_loopback(process.host)) continue;  // a router's clients may all be here
      findings.push_back(
          {State::kError, Category::kNames, process.name, "address", process.host,
           "an address that the other hosts reach",
           fmt::format("give {} the address of this machine as `host` in the cluster file", process.name)});
    }
  }
  return findings;
}

}  // namespace tandem::check
