// The cluster file: which workers and router make up one deployment. Read strictly: an unknown key, a wrong type or a
// value out of range is an error with file and line.
//
//   model: models/demo              # directory, relative to where `tandem up` runs
//   options: {max-num-seqs: 16}     # of every worker, named as on the command line of `tandem serve`
//   workers:
//     - {role: prefill, count: 1}
//     - {role: decode, name: decode, port: 8200, kv_port: 14600, options: {threads: 1}}
//   router: {port: 8000, policy: least_load}
//
// A worker or the router may be on another host (`host: 10.0.0.2`), and the ranks of a worker may be spread evenly over
// several (`nodes: [10.0.0.1, 10.0.0.2]` beside the option data-parallel-size; the first has the endpoint). `tandem
// check` examines such a cluster; `tandem up` starts processes of this host only.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "src/base/options.h"
#include "src/base/result.h"

namespace tandem::cluster {

enum class WorkerRole : uint8_t {
  kPrefill,  // computes prompts and hands their KV over
  kDecode,   // computes the tokens after the first
  kBoth,     // serves whole requests
};
const char* role_name(WorkerRole role);  // "prefill", "decode", "both"

using OptionMap = std::map<std::string, OptionValue>;  // by option name

struct WorkerGroup {
  int line = 0;  // in the file, for messages
  WorkerRole role = WorkerRole::kBoth;
  std::string name;  // default: the role
  int64_t count = 1;
  std::string host = "127.0.0.1";
  std::vector<std::string> nodes;  // hosts that share the ranks, instead of `host`; the first is also in `host`
  std::optional<int64_t> port;     // of the first worker of the group; the others follow
  std::optional<int64_t> kv_port;  // likewise
  OptionMap options;               // of tandem serve; over the common ones
};

struct RouterSpec {
  int line = 0;
  std::string host = "127.0.0.1";
  int64_t port = 8000;
  OptionMap options;  // of tandem route
};

struct ClusterSpec {
  std::string file;
  std::string model;
  OptionMap options;
  std::vector<WorkerGroup> workers;
  std::optional<RouterSpec> router;  // absent only if it was not named and one worker serves whole requests
};

Result<ClusterSpec> load_cluster_file(const std::string& path);

// An error that names the line of the first worker, or the router, that is not on a loopback address of this machine.
Status check_startable_here(const ClusterSpec& spec);

}  // namespace tandem::cluster
