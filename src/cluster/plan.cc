#include "src/cluster/plan.h"

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "src/base/kv_transfer_config.h"

namespace tandem::cluster {
namespace {

// Where ports start that the file does not give. KV ports start at vLLM's default kv_port.
constexpr int64_t kPrefillPorts = 8100;
constexpr int64_t kDecodePorts = 8200;
constexpr int64_t kBothPorts = 8300;
constexpr int64_t kKvPorts = 14579;
constexpr int64_t kRpcPort = 29550;  // where ranks of several nodes meet, as `tandem serve` has it

struct PortCounters {
  int64_t prefill = kPrefillPorts;
  int64_t decode = kDecodePorts;
  int64_t both = kBothPorts;
  int64_t kv = kKvPorts;

  int64_t& of(WorkerRole role) {
    return role == WorkerRole::kPrefill ? prefill : role == WorkerRole::kDecode ? decode : both;
  }
};

void append_options(Subcommand command, const OptionMap& options, std::vector<std::string>& arguments) {
  for (const auto& [name, value] : options) {
    const OptionSpec& spec = **find_option(command, name);
    for (std::string& word : option_to_arguments(spec, value)) arguments.push_back(std::move(word));
  }
}

// The file may give kv_connector_extra_config and the like; role, port and id follow from the plan.
Result<std::string> make_transfer_config(const ClusterSpec& spec, const WorkerGroup& group, const ProcessSpec& process,
                                         const OptionMap& options) {
  nlohmann::json config = {
      {"kv_connector", "UcxConnector"},
      {"kv_role", kv_role_name(group.role == WorkerRole::kPrefill ? KvRole::kProducer : KvRole::kConsumer)},
      {"kv_ip", process.host},
      {"kv_port", process.kv_port},
      {"engine_id", process.name}};
  if (const auto given = options.find("kv-transfer-config"); given != options.end()) {
    const nlohmann::json extra = nlohmann::json::parse(std::get<std::string>(given->second));
    for (const auto& [field, value] : extra.items()) {
      if (config.contains(field) && field != "kv_connector") {
        return invalid_argument("kv-transfer-config",
                                "{}:{}: kv-transfer-config.{} follows from role, kv_port and name "
                                "of worker '{}'; remove it",
                                spec.file, group.line, field, process.name);
      }
      config[field] = value;
    }
  }
  const std::string text = config.dump();
  const Result<KvTransferConfig> checked = parse_kv_transfer_config(text);
  if (!checked.ok()) {
    return invalid_argument(checked.error().param, "{}:{}: {}", spec.file, group.line, checked.error().message);
  }
  return text;
}

int64_t integer_of(const OptionMap& options, const char* name, int64_t otherwise) {
  const auto found = options.find(name);
  return found == options.end() ? otherwise : std::get<int64_t>(found->second);
}

// The ranks of one node of a worker that is spread over several: first, number, and the options that say so.
Status plan_node(const ClusterSpec& spec, const WorkerGroup& group, int64_t index, OptionMap& options,
                 ProcessSpec& process) {
  for (const char* derived : {"data-parallel-size-local", "data-parallel-start-rank", "data-parallel-address",
                              "headless", "data-parallel-rank"}) {
    if (options.contains(derived)) {
      return invalid_argument(derived, "{}:{}: '{}' follows from 'nodes' of worker '{}' and cannot be an option",
                              spec.file, group.line, derived, group.name);
    }
  }
  const int64_t num_nodes = std::ssize(group.nodes);
  const int64_t size = integer_of(options, "data-parallel-size", 1);
  if (size % num_nodes != 0) {
    return invalid_argument("nodes", "{}:{}: {} nodes cannot share data-parallel-size {} evenly; give a multiple of {}",
                            spec.file, group.line, num_nodes, size, num_nodes);
  }
  process.num_ranks = size / num_nodes;
  process.first_rank = index * process.num_ranks;
  options.emplace("data-parallel-size-local", process.num_ranks);
  options.emplace("data-parallel-address", group.nodes.front());
  const int64_t rpc_port = integer_of(options, "data-parallel-rpc-port", kRpcPort);
  options.insert_or_assign("data-parallel-rpc-port", rpc_port);
  if (index == 0) {
    process.rpc_port = rpc_port;
  } else {
    options.emplace("data-parallel-start-rank", process.first_rank);
    options.emplace("headless", true);
  }
  return {};
}

// One process per worker, or per node of it.
Result<ProcessSpec> plan_worker(const ClusterSpec& spec, const WorkerGroup& group, int64_t index,
                                const std::string& log_level, PortCounters& ports) {
  const bool is_spread = !group.nodes.empty();
  ProcessSpec process;
  process.name = group.count == 1 && !is_spread ? group.name : fmt::format("{}-{}", group.name, index);
  process.role = role_name(group.role);
  process.host = is_spread ? group.nodes[static_cast<size_t>(index)] : group.host;
  OptionMap options = group.options;
  options.insert(spec.options.begin(), spec.options.end());  // keeps the group's own
  const int64_t size = integer_of(options, "data-parallel-size", 1);
  if (is_spread) {
    TANDEM_TRY(plan_node(spec, group, index, options, process));
  } else if (size > 1) {
    process.num_ranks = size;
    process.rpc_port = integer_of(options, "data-parallel-rpc-port", 0);
  }
  process.arguments = {"serve", spec.model, "--host", process.host};
  if (!is_spread || index == 0) {
    const bool serves_alone = !spec.router;
    process.port = group.port ? *group.port + index : serves_alone ? RouterSpec().port : ports.of(group.role)++;
    process.arguments.insert(process.arguments.end(), {"--port", std::to_string(process.port)});
  }
  process.arguments.insert(process.arguments.end(), {"--log-name", process.name});
  if (group.role != WorkerRole::kBoth) {
    // Every rank has its own; those of a spread worker are counted over all nodes.
    const int64_t base = group.kv_port.value_or(ports.kv);
    process.kv_port = base + (is_spread ? 0 : index * size);
    const bool is_last = index + 1 == (is_spread ? std::ssize(group.nodes) : group.count);
    if (!group.kv_port && is_last) ports.kv = base + size * group.count;
    TANDEM_ASSIGN(std::string config, make_transfer_config(spec, group, process, options));
    options.erase("kv-transfer-config");
    process.arguments.insert(process.arguments.end(), {"--kv-transfer-config", std::move(config)});
  } else if (group.kv_port) {
    return invalid_argument("kv_port", "{}:{}: worker '{}' has a kv_port but role both hands no KV over", spec.file,
                            group.line, group.name);
  }
  options.try_emplace("log-level", log_level);
  append_options(Subcommand::kServe, options, process.arguments);
  return process;
}

ProcessSpec plan_router(const ClusterSpec& spec, const ClusterPlan& plan, const std::string& log_level) {
  ProcessSpec process;
  process.name = process.role = "router";
  process.host = spec.router->host;
  process.port = spec.router->port;
  process.arguments = {"route", "--host", process.host, "--port", std::to_string(process.port), "--log-name", "router"};
  OptionMap options = spec.router->options;
  options.try_emplace("log-level", log_level);
  // Clients see one name for the model, whichever process answers.
  if (const auto names = spec.options.find("served-model-name"); names != spec.options.end()) options.insert(*names);
  append_options(Subcommand::kRoute, options, process.arguments);
  for (const char* role : {"prefill", "decode"}) {
    std::vector<std::string> urls;
    for (const ProcessSpec& worker : plan.processes) {
      const bool is_prefill = worker.role == "prefill";
      if (!worker.has_endpoint()) continue;
      if (is_prefill == (std::string_view(role) == "prefill")) urls.push_back(worker.url());
    }
    if (urls.empty()) continue;
    process.arguments.push_back(std::string("--") + role);
    process.arguments.insert(process.arguments.end(), urls.begin(), urls.end());
  }
  return process;
}

Status check_overlaps(const ClusterSpec& spec, const ClusterPlan& plan) {
  std::map<std::pair<std::string, int64_t>, std::string> owners;  // loopback addresses are one host
  std::set<std::string> names;
  for (const ProcessSpec& process : plan.processes) {
    if (!names.insert(process.name).second) {
      return invalid_argument("name", "{}: two processes are named '{}'; give each group of workers its own name",
                              spec.file, process.name);
    }
    for (const PortUse& used : list_ports(process)) {
      const std::string use = fmt::format("{}'s {}", process.name, used.what);
      if (used.port > 65535)
        return invalid_argument("port", "{}: {} would be {}, above 65535", spec.file, use, used.port);
      const std::string host = process.host.rfind("127.", 0) == 0 ? "127.0.0.1" : process.host;
      const auto [owner, is_new] = owners.emplace(std::pair(host, used.port), use);
      if (!is_new) {
        return invalid_argument("port", "{}: {} and {} are both {}; change one", spec.file, owner->second, use,
                                used.port);
      }
    }
  }
  return {};
}

}  // namespace

std::string ProcessSpec::url() const {
  const bool is_v6 = host.find(':') != std::string::npos;
  return is_v6 ? fmt::format("http://[{}]:{}", host, port) : fmt::format("http://{}:{}", host, port);
}

std::vector<PortUse> list_ports(const ProcessSpec& process) {
  std::vector<PortUse> ports;
  if (process.has_endpoint()) ports.push_back({process.port, "port"});
  if (process.kv_port > 0) {
    for (int64_t rank = process.first_rank; rank < process.first_rank + process.num_ranks; ++rank) {
      const bool is_alone = process.first_rank == 0 && process.num_ranks == 1;
      ports.push_back({process.kv_port + rank, is_alone ? "kv_port" : fmt::format("kv_port of rank {}", rank), true});
    }
  }
  if (process.rpc_port > 0) ports.push_back({process.rpc_port, "data-parallel-rpc-port"});
  return ports;
}

Result<ClusterPlan> plan_cluster(const ClusterSpec& spec, const std::string& log_level) {
  ClusterPlan plan;
  plan.model = spec.model;
  PortCounters ports;
  for (const WorkerGroup& group : spec.workers) {
    const int64_t num_processes = group.nodes.empty() ? group.count : std::ssize(group.nodes);
    for (int64_t i = 0; i < num_processes; ++i) {
      TANDEM_ASSIGN(ProcessSpec process, plan_worker(spec, group, i, log_level, ports));
      plan.processes.push_back(std::move(process));
    }
  }
  if (spec.router) plan.processes.push_back(plan_router(spec, plan, log_level));
  TANDEM_TRY(check_overlaps(spec, plan));
  return plan;
}

std::string describe_plan(const ClusterPlan& plan, const std::string& run_dir) {
  std::string out = fmt::format("{:<14} {:<8} {:<28} {:<8} {}\n", "process", "role", "address", "kv port", "log");
  for (const ProcessSpec& process : plan.processes) {
    const std::string kv = process.kv_port > 0 ? std::to_string(process.kv_port) : "-";
    out += fmt::format("{:<14} {:<8} {:<28} {:<8} {}/{}.log\n", process.name, process.role,
                       process.has_endpoint() ? process.url() : process.host + " (no endpoint)", kv, run_dir,
                       process.name);
  }
  return out;
}

}  // namespace tandem::cluster
