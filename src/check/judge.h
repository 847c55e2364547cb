// From measurements to findings: what is good enough, and what to do if it is not. Pure.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/check/facts.h"
#include "src/check/finding.h"
#include "src/check/ports.h"
#include "src/check/targets.h"
#include "src/check/transport.h"

namespace tandem::check {

// Nothing of Tandem waits by the wall clock; logs and traces of two hosts line up within this.
inline constexpr int64_t kMostClockOffsetUs = 100'000;
// 1 Gbit/s, less what TCP takes. The KV of a prompt of 1,000 tokens is about 70 MB for DeepSeek-V3, 100 MB for
// Qwen3-30B.
inline constexpr double kLeastBytesPerS = 110e6;
inline constexpr double kMostRoundTripUs = 2'000;
// Each transfer connection of one host takes 2 MiB of /dev/shm per side.
inline constexpr int64_t kLeastSharedBytes = int64_t{64} << 20;

struct ClockReading {
  int64_t offset_us = 0;       // of the other host's clock over this one's
  int64_t uncertainty_us = 0;  // half of the round trip
};
Finding judge_clock(const std::string& host, const ClockReading& reading);

// The limits of a host, and what its processes take of processors and memory. `processes`: facts of target.processes,
// in order; those of routers are left out of account.
std::vector<Finding> judge_host(const Target& target, const HostFacts& host,
                                const std::vector<ProcessFacts>& processes);

// All hosts must run the same program; the first is the measure.
std::vector<Finding> judge_programs(const std::vector<std::pair<std::string, HostFacts>>& hosts);

struct ExaminedProcess {
  std::string name;
  std::string role;
  std::string host;
  ProcessFacts facts;
};
// All processes of one cluster must have the same model, those that hand KV over the same KV layout.
std::vector<Finding> judge_models(const std::vector<ExaminedProcess>& processes);

Finding judge_port(const Endpoint& endpoint, const ListenOutcome& outcome);
Finding judge_reach(const std::string& from, const Endpoint& to, const ConnectOutcome& outcome);
// For a host without an agent, whose ports nobody holds open: only that packets arrive can be told.
Finding judge_reach_unattended(const std::string& from, const Endpoint& to, const ConnectOutcome& outcome);

// What each host takes a name for: addresses[name][host].
using Resolutions = std::map<std::string, std::map<std::string, std::string>>;
std::vector<Finding> judge_names(const Resolutions& addresses);

Finding judge_transport(const std::string& from, const Endpoint& to, const Result<TransportReading>& reading);

// `tandem check-agent …` as it has to be typed on a host.
std::string agent_command(const std::string& host, int64_t agent_port);
Finding judge_missing_agent(const std::string& host, int64_t agent_port, const Error& why, bool is_refused);

}  // namespace tandem::check
