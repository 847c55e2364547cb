#include "src/cluster/cluster_file.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <set>

#include "src/base/options_yaml.h"

namespace tandem::cluster {
namespace {

constexpr int64_t kMaxWorkers = 64;  // of one host

// Options that follow from the file itself.
const std::set<std::string, std::less<>> kDerivedOptions = {"host",     "port",    "model", "config",
                                                            "log-name", "prefill", "decode"};

// A map of the file with what is needed for messages about it.
struct Section {
  const std::string& file;
  const YAML::Node node;
  std::string name;  // "workers[1]"

  Error fault(const YAML::Node& at, const std::string& message) const {
    return invalid_argument(name, "{}{}", yaml_place(file, at), message);
  }
};

Status check_keys(const Section& section, const std::vector<std::string>& allowed) {
  if (!section.node.IsMap()) return section.fault(section.node, section.name + " must be a map");
  std::set<std::string> seen;
  for (const auto& pair : section.node) {
    if (!pair.first.IsScalar()) return section.fault(pair.first, "a key must be a word");
    const std::string key = pair.first.Scalar();
    if (!seen.insert(key).second) return section.fault(pair.first, fmt::format("'{}' is given twice", key));
    if (std::find(allowed.begin(), allowed.end(), key) != allowed.end()) continue;
    const std::string nearest = nearest_name(key, allowed);
    return section.fault(pair.first,
                         fmt::format("unknown key '{}' in {}{}", key, section.name,
                                     nearest.empty() ? fmt::format("; it takes {}", fmt::join(allowed, ", "))
                                                     : fmt::format("; did you mean '{}'?", nearest)));
  }
  return {};
}

Status take_text(const Section& section, const char* key, std::string& out) {
  const YAML::Node value = section.node[key];
  if (!value) return {};
  if (!value.IsScalar() || value.Scalar().empty()) return section.fault(value, fmt::format("'{}' must be a text", key));
  out = value.Scalar();
  return {};
}

Result<std::optional<int64_t>> take_integer(const Section& section, const char* key, int64_t min, int64_t max) {
  const YAML::Node value = section.node[key];
  if (!value) return std::optional<int64_t>();
  const std::string text = value.IsScalar() ? value.Scalar() : "not a number";
  int64_t number = 0;
  const std::from_chars_result parsed = std::from_chars(text.data(), text.data() + text.size(), number);
  const bool is_number = parsed.ec == std::errc() && parsed.ptr == text.data() + text.size();
  if (!is_number || number < min || number > max) {
    return section.fault(value, fmt::format("'{}' is {}; it must be an integer from {} to {}", key, text, min, max));
  }
  return std::optional<int64_t>(number);
}

Status take_options(const Section& section, Subcommand command, OptionMap& out) {
  const YAML::Node map = section.node["options"];
  if (!map) return {};
  if (!map.IsMap()) return section.fault(map, "'options' must be a map of option names to values");
  for (const auto& pair : map) {
    const std::string key = pair.first.IsScalar() ? pair.first.Scalar() : "";
    const Result<const OptionSpec*> spec = find_option(command, key);
    if (!spec.ok()) return section.fault(pair.first, spec.error().message);
    const std::string name = (*spec)->name;
    if (kDerivedOptions.contains(name)) {
      return section.fault(pair.first, fmt::format("'{}' follows from the cluster file and cannot be an option", name));
    }
    if (out.contains(name)) return section.fault(pair.first, fmt::format("'{}' is given twice", name));
    Result<OptionValue> value = yaml_option_value(**spec, pair.second);
    if (!value.ok()) return section.fault(pair.first, value.error().message);
    out.emplace(name, std::move(value).value());
  }
  return {};
}

// Also IPv6 addresses. What is not even a name is a slip of the file's writer.
bool is_host_name(const std::string& host) {
  return !host.empty() && host.size() <= 253 && std::all_of(host.begin(), host.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '.' || c == '-' || c == '_' || c == ':';
  });
}

Status take_host(const Section& section, std::string& host) {
  TANDEM_TRY(take_text(section, "host", host));
  if (host == "localhost") host = "127.0.0.1";
  if (is_host_name(host)) return {};
  return section.fault(section.node["host"], fmt::format("host '{}' is neither a name nor an address", host));
}

Status take_nodes(const Section& section, WorkerGroup& group) {
  const YAML::Node list = section.node["nodes"];
  if (!list) return {};
  if (section.node["host"]) return section.fault(list, "'host' and 'nodes' exclude each other");
  if (group.count != 1) return section.fault(list, "'nodes' and 'count' exclude each other: the nodes are one worker");
  if (!list.IsSequence() || list.size() < 2 || static_cast<int64_t>(list.size()) > kMaxWorkers) {
    return section.fault(list, fmt::format("'nodes' must be a list of 2 to {} hosts", kMaxWorkers));
  }
  for (const YAML::Node& node : list) {
    if (!node.IsScalar() || !is_host_name(node.Scalar()))
      return section.fault(node, "a node must be a name or an address");
    group.nodes.push_back(node.Scalar());
  }
  if (std::set<std::string>(group.nodes.begin(), group.nodes.end()).size() != group.nodes.size()) {
    return section.fault(list, "'nodes' has the same host twice");
  }
  group.host = group.nodes.front();
  return {};
}

Result<WorkerGroup> read_worker(const Section& section) {
  TANDEM_TRY(check_keys(section, {"name", "role", "count", "host", "nodes", "port", "kv_port", "options"}));
  WorkerGroup group;
  group.line = section.node.Mark().line + 1;
  std::string role;
  TANDEM_TRY(take_text(section, "role", role));
  if (role.empty()) return section.fault(section.node, "'role' is missing; it is prefill, decode or both");
  if (role != "prefill" && role != "decode" && role != "both") {
    return section.fault(section.node["role"], fmt::format("role '{}' must be prefill, decode or both", role));
  }
  group.role = role == "prefill" ? WorkerRole::kPrefill : role == "decode" ? WorkerRole::kDecode : WorkerRole::kBoth;
  group.name = role == "both" ? "worker" : role;
  TANDEM_TRY(take_text(section, "name", group.name));
  const bool is_word = std::all_of(group.name.begin(), group.name.end(),
                                   [](unsigned char c) { return std::isalnum(c) != 0 || c == '-' || c == '_'; });
  if (!is_word) {
    return section.fault(section.node["name"],
                         fmt::format("name '{}' may have letters, digits, '-' and '_'", group.name));
  }
  TANDEM_ASSIGN(const std::optional<int64_t> count, take_integer(section, "count", 1, kMaxWorkers));
  group.count = count.value_or(1);
  TANDEM_TRY(take_host(section, group.host));
  TANDEM_TRY(take_nodes(section, group));
  TANDEM_ASSIGN(group.port, take_integer(section, "port", 1, 65535));
  TANDEM_ASSIGN(group.kv_port, take_integer(section, "kv_port", 1, 65535));
  TANDEM_TRY(take_options(section, Subcommand::kServe, group.options));
  return group;
}

Result<RouterSpec> read_router(const Section& section) {
  TANDEM_TRY(check_keys(section, {"host", "port", "policy", "options"}));
  RouterSpec router;
  router.line = section.node.Mark().line + 1;
  TANDEM_TRY(take_host(section, router.host));
  TANDEM_ASSIGN(const std::optional<int64_t> port, take_integer(section, "port", 1, 65535));
  router.port = port.value_or(router.port);
  TANDEM_TRY(take_options(section, Subcommand::kRoute, router.options));
  if (const YAML::Node policy = section.node["policy"]) {
    Result<OptionValue> value = yaml_option_value(**find_option(Subcommand::kRoute, "policy"), policy);
    if (!value.ok()) return section.fault(policy, value.error().message);
    router.options.insert_or_assign("policy", std::move(value).value());
  }
  return router;
}

// Which roles go together, and when a router is needed.
Status check_roles(ClusterSpec& spec) {
  int64_t prefill = 0, decode = 0, both = 0;
  for (const WorkerGroup& group : spec.workers) {
    (group.role == WorkerRole::kPrefill ? prefill : group.role == WorkerRole::kDecode ? decode : both) += group.count;
  }
  if (prefill + decode + both > kMaxWorkers) {
    return invalid_argument("workers", "{}: {} workers are more than the {} of one host", spec.file,
                            prefill + decode + both, kMaxWorkers);
  }
  if (prefill > 0 && decode == 0) {
    return invalid_argument("workers", "{}: {} prefill worker(s) but no decode worker; add one with role: decode",
                            spec.file, prefill);
  }
  if (decode > 0 && prefill == 0) {
    return invalid_argument("workers",
                            "{}: {} decode worker(s) but no prefill worker; add one with role: prefill, or "
                            "use role: both",
                            spec.file, decode);
  }
  if (both > 0 && prefill > 0) {
    return invalid_argument(
        "workers", "{}: role both serves whole requests and cannot be mixed with prefill and decode", spec.file);
  }
  if (!spec.router && both != 1) spec.router.emplace();
  return {};
}

}  // namespace

const char* role_name(WorkerRole role) {
  switch (role) {
    case WorkerRole::kPrefill:
      return "prefill";
    case WorkerRole::kDecode:
      return "decode";
    case WorkerRole::kBoth:
      return "both";
  }
  return "?";
}

Result<ClusterSpec> load_cluster_file(const std::string& path) {
  TANDEM_ASSIGN(const YAML::Node root, load_yaml_file(path));
  ClusterSpec spec;
  spec.file = path;
  const Section top{spec.file, root, "the cluster file"};
  TANDEM_TRY(check_keys(top, {"model", "options", "workers", "router"}));
  TANDEM_TRY(take_text(top, "model", spec.model));
  if (spec.model.empty()) return invalid_argument("model", "{}: 'model' is missing; give the model's directory", path);
  TANDEM_TRY(take_options(top, Subcommand::kServe, spec.options));
  const YAML::Node workers = root["workers"];
  if (!workers || !workers.IsSequence() || workers.size() == 0) {
    return invalid_argument("workers", "{}: 'workers' must be a list with at least one worker", path);
  }
  for (size_t i = 0; i < workers.size(); ++i) {
    TANDEM_ASSIGN(WorkerGroup group, read_worker({spec.file, workers[i], fmt::format("workers[{}]", i)}));
    spec.workers.push_back(std::move(group));
  }
  if (const YAML::Node router = root["router"]) {
    TANDEM_ASSIGN(RouterSpec parsed, read_router({spec.file, router, "router"}));
    spec.router = std::move(parsed);
  }
  TANDEM_TRY(check_roles(spec));
  return spec;
}

Status check_startable_here(const ClusterSpec& spec) {
  const auto refuse = [&](int line, const std::string& what, const std::string& host) {
    return invalid_argument(
        "host",
        "{}:{}: host '{}' of {} is not a loopback address; `tandem up` starts processes on this host "
        "only. Start it there by hand, with the command line that `tandem up --dry-run` prints; `tandem "
        "check` examines the hosts",
        spec.file, line, host, what);
  };
  for (const WorkerGroup& group : spec.workers) {
    if (!group.nodes.empty()) return refuse(group.line, fmt::format("worker '{}'", group.name), group.nodes.back());
    if (group.host.rfind("127.", 0) != 0) return refuse(group.line, fmt::format("worker '{}'", group.name), group.host);
  }
  if (spec.router && spec.router->host.rfind("127.", 0) != 0)
    return refuse(spec.router->line, "the router", spec.router->host);
  return {};
}

}  // namespace tandem::cluster
