// What one host is and has, against what its processes need.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "src/check/judge.h"

namespace tandem::check {
namespace {

std::string mebibytes(int64_t bytes) {
  return bytes < 0 ? "unlimited" : fmt::format("{:.0f} MiB", static_cast<double>(bytes) / (1 << 20));
}

// Tandem's transports are TCP and shared memory so far: neither locks memory. Registration with RDMA would.
Finding judge_locked_memory(const std::string& where, const HostFacts& host) {
  Finding finding{State::kOk, Category::kLimits, where, "locked memory", mebibytes(host.locked_memory_bytes), "", ""};
  if (!host.rdma_ports.empty() && host.locked_memory_bytes >= 0) {
    finding.state = State::kWarn;
    finding.limit = "unlimited beside RDMA devices";
    finding.remedy = "ulimit -l unlimited, LimitMEMLOCK=infinity in the unit, or --ulimit memlock=-1 of the container";
  }
  return finding;
}

Finding judge_shared_memory(const std::string& where, const HostFacts& host) {
  Finding finding{State::kOk,
                  Category::kLimits,
                  where,
                  "/dev/shm",
                  mebibytes(host.shm_free_bytes) + " free",
                  mebibytes(kLeastSharedBytes),
                  ""};
  if (host.shm_free_bytes < 0) {
    finding.state = State::kError;
    finding.value = "missing or not writable";
    finding.remedy = "mount a tmpfs there: processes of one host pass KV through it";
  } else if (host.shm_free_bytes < kLeastSharedBytes) {
    finding.state = State::kWarn;
    finding.remedy =
        "remove what lies there, or enlarge it (mount -o remount,size=1G /dev/shm; --shm-size of the container)";
  }
  return finding;
}

Finding judge_huge_pages(const std::string& where, const HostFacts& host) {
  const std::string mode = host.transparent_huge_pages.empty() ? "unknown" : host.transparent_huge_pages;
  Finding finding{State::kOk,
                  Category::kLimits,
                  where,
                  "huge pages",
                  fmt::format("transparent: {}, reserved: {}", mode, host.huge_pages),
                  "",
                  ""};
  if (mode == "never") {
    finding.state = State::kWarn;
    finding.limit = "madvise or always";
    finding.remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: weights are asked for in huge pages";
  }
  return finding;
}

Finding judge_processors(const std::string& where, const HostFacts& host, int64_t threads, int64_t num_processes) {
  double usable = static_cast<double>(host.processors);
  std::string value = fmt::format("{} threads on {} processors", threads, host.processors);
  if (host.quota >= 0 && host.quota < usable) {
    usable = host.quota;
    value += fmt::format(", of which the control group gives the time of {:.1f}", host.quota);
  }
  Finding finding{State::kOk, Category::kProcessors,         where, "compute threads",
                  value,      fmt::format("{:.1f}", usable), ""};
  if (static_cast<double>(threads) > usable) {
    finding.state = State::kWarn;
    const int64_t each = static_cast<int64_t>(usable) / std::max<int64_t>(1, num_processes);
    finding.remedy =
        each == 0 ? fmt::format("{} ranks here compute by turns: have fewer, or more processors", num_processes)
                  : fmt::format("give each of the {} ranks here at most {} threads (option threads), or more processors",
                                num_processes, each);
  }
  return finding;
}

Finding judge_memory(const std::string& where, const HostFacts& host, int64_t needed_bytes) {
  Finding finding{State::kOk,
                  Category::kMemory,
                  where,
                  "memory",
                  mebibytes(needed_bytes) + " needed",
                  fmt::format("{} available ({})", mebibytes(host.available_bytes), host.available_by),
                  ""};
  if (needed_bytes > host.available_bytes) {
    finding.state = State::kError;
    finding.remedy = "lower kv-cache-memory-bytes, use a quantization of fewer bits, or move a worker to another host";
  }
  return finding;
}

}  // namespace

std::vector<Finding> judge_host(const Target& target, const HostFacts& host,
                                const std::vector<ProcessFacts>& processes) {
  const std::string& where = target.host;
  std::vector<Finding> findings = {judge_locked_memory(where, host), judge_shared_memory(where, host)};
  findings.push_back({host.memfd_fault.empty() ? State::kOk : State::kError, Category::kLimits, where,
                      "anonymous shared memory", host.memfd_fault.empty() ? "can be made" : host.memfd_fault, "",
                      host.memfd_fault.empty() ? "" : "allow memfd_create: ranks of one host exchange through it"});
  findings.push_back(judge_huge_pages(where, host));
  std::string ports;
  for (const RdmaPort& port : host.rdma_ports)
    ports += fmt::format("{}{} ({})", ports.empty() ? "" : ", ", port.name, port.state);
  findings.push_back({State::kOk, Category::kLimits, where, "RDMA",
                      ports.empty() ? "none" : ports + "; not used by this version", "", ""});
  int64_t threads = 0;
  int64_t needed_bytes = 0;
  int64_t num_ranks = 0;
  for (size_t i = 0; i < processes.size(); ++i) {
    if (target.processes[i].role == "router") continue;
    threads += processes[i].threads;
    needed_bytes += processes[i].memory_bytes;
    num_ranks += target.processes[i].num_ranks;
  }
  if (num_ranks > 0) findings.push_back(judge_processors(where, host, threads, num_ranks));
  if (needed_bytes > 0) findings.push_back(judge_memory(where, host, needed_bytes));
  return findings;
}

}  // namespace tandem::check
