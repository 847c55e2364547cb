// The check of a cluster: asks every host, this one directly and the others through their agents, and judges the
// answers.
#pragma once

#include <cstdint>
#include <vector>

#include "src/check/agent.h"
#include "src/check/finding.h"
#include "src/check/responder.h"
#include "src/cluster/plan.h"

namespace tandem::check {

// Pairs of hosts whose transport is measured, one after the other, each in about half a second: all of up to 8 hosts.
// Of more hosts only each with the next.
inline constexpr int64_t kMaxMeasuredPairs = 56;

struct RunOptions {
  int64_t agent_port = kDefaultAgentPort;
  int64_t timeout_ms = 2'000;  // of a connection, and of an agent's first answer
  ProcessExaminer examine;
};

// Hosts are asked at the same time; a host that does not answer costs two `timeout_ms`.
std::vector<Finding> run_check(const cluster::ClusterPlan& plan, const RunOptions& options);

}  // namespace tandem::check
