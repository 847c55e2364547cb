// What a host and a process on it are, as an agent tells it. Plain values; JSON on the wire.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "src/base/result.h"

namespace tandem::check {

struct RdmaPort {
  std::string name;   // "mlx5_0/1"
  std::string state;  // as the kernel says, "4: ACTIVE"
  bool operator==(const RdmaPort&) const = default;
};

struct HostFacts {
  std::string version;                 // of the program
  std::string program_sha256;          // of its file
  std::string folder;                  // where it was started: model paths are relative to it
  int64_t locked_memory_bytes = 0;     // RLIMIT_MEMLOCK; -1: no limit
  int64_t shm_free_bytes = -1;         // of /dev/shm; -1: there is none that can be written
  std::string memfd_fault;             // why no anonymous shared memory can be made; "": it can
  std::string transparent_huge_pages;  // "always", "madvise", "never"; "": unknown
  int64_t huge_pages = 0;              // reserved ones
  std::vector<RdmaPort> rdma_ports;
  int64_t processors = 0;       // that the affinity mask leaves
  double quota = -1;            // of the control group, in processors; -1: none
  int64_t available_bytes = 0;  // of memory, here and now
  std::string available_by;     // what says so
};

struct ProcessFacts {
  std::string fault;  // why the options or the model are refused; the rest is then as far as it got
  std::string config_hash;
  std::string weights_hash;
  std::string tokenizer_hash;
  std::string kv_layout;        // KvLayout::describe_token(): blocks may differ in size
  std::string instruction_set;  // of its kernels
  int64_t threads = 0;          // compute threads of all its ranks here
  int64_t memory_bytes = 0;     // of all its ranks here
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(RdmaPort, name, state)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(HostFacts, version, program_sha256, folder, locked_memory_bytes,
                                                shm_free_bytes, memfd_fault, transparent_huge_pages, huge_pages,
                                                rdma_ports, processors, quota, available_bytes, available_by)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(ProcessFacts, fault, config_hash, weights_hash, tokenizer_hash,
                                                kv_layout, instruction_set, threads, memory_bytes)

// Reads them from this host; takes as long as hashing the program's file. `root` is put in front of /proc and /sys.
HostFacts read_host_facts(const std::string& root = "");

// The value of a JSON document from a peer; one of another shape is an error that names `what`.
template <typename T>
Result<T> from_peer(const nlohmann::json& document, const char* what) {
  try {
    return document.get<T>();
  } catch (const nlohmann::json::exception& fault) {
    return make_error(ErrorKind::kDataLoss, "{} of another shape: {}", what, fault.what());
  }
}

}  // namespace tandem::check
