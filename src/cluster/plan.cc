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

Result<ProcessSpec> plan_worker(const ClusterSpec& spec, const WorkerGroup& group, int64_t index,
                                const std::string& log_level, PortCounters& ports) {
  ProcessSpec process;
  process.name = group.count == 1 ? group.name : fmt::format("{}-{}", group.name, index);
  process.role = role_name(group.role);
  process.host = group.host;
  const bool serves_alone = !spec.router;
  process.port = group.port ? *group.port + index : serves_alone ? RouterSpec().port : ports.of(group.role)++;
  OptionMap options = group.options;
  options.insert(spec.options.begin(), spec.options.end());  // keeps the group's own

  process.arguments = {"serve",      spec.model,  "--host", process.host, "--port", std::to_string(process.port),
                       "--log-name", process.name};
  if (group.role != WorkerRole::kBoth) {
    process.kv_port = group.kv_port ? *group.kv_port + index : ports.kv++;
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
      if (is_prefill == (std::string_view(role) == "prefill")) urls.push_back(worker.url());
    }
    if (urls.empty()) continue;
    process.arguments.push_back(std::string("--") + role);
    process.arguments.insert(process.arguments.end(), urls.begin(), urls.end());
  }
  return process;
}

Status check_overlaps(const ClusterSpec& spec, const ClusterPlan& plan) {
  std::map<int64_t, std::string> owners;
  std::set<std::string> names;
  for (const ProcessSpec& process : plan.processes) {
    if (!names.insert(process.name).second) {
      return invalid_argument("name", "{}: two processes are named '{}'; give each group of workers its own name",
                              spec.file, process.name);
    }
    for (const int64_t port : {process.port, process.kv_port}) {
      if (port == 0) continue;
      const std::string use = fmt::format("{}'s {}", process.name, port == process.kv_port ? "kv_port" : "port");
      if (port > 65535) return invalid_argument("port", "{}: {} would be {}, above 65535", spec.file, use, port);
      const auto [owner, is_new] = owners.emplace(port, use);
      if (!is_new) {
        return invalid_argument("port", "{}: {} and {} are both {}; change one", spec.file, owner->second, use, port);
      }
    }
  }
  return {};
}

}  // namespace

std::string ProcessSpec::url() const { return fmt::format("http://{}:{}", host, port); }

Result<ClusterPlan> plan_cluster(const ClusterSpec& spec, const std::string& log_level) {
  ClusterPlan plan;
  plan.model = spec.model;
  PortCounters ports;
  for (const WorkerGroup& group : spec.workers) {
    for (int64_t i = 0; i < group.count; ++i) {
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
    out += fmt::format("{:<14} {:<8} {:<28} {:<8} {}/{}.log\n", process.name, process.role, process.url(), kv, run_dir,
                       process.name);
  }
  return out;
}

}  // namespace tandem::cluster
