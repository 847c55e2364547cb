#include "src/cluster/cluster_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "src/cluster/plan.h"
#include "src/cluster/restart_policy.h"

namespace tandem::cluster {
namespace {

std::string write_file(const std::string& text) {
  const std::string path = fmt::format("{}/cluster-{}.yaml", testing::TempDir(), getpid());
  std::ofstream(path) << text;
  return path;
}

// The error's message with the file's path replaced by "F".
std::string error_in(const std::string& text) {
  const std::string path = write_file(text);
  const Result<ClusterSpec> spec = load_cluster_file(path);
  std::string message = "no error";
  if (!spec.ok()) {
    message = spec.error().message;
  } else if (const Result<ClusterPlan> plan = plan_cluster(*spec, "info"); !plan.ok()) {
    message = plan.error().message;
  }
  if (const size_t at = message.find(path); at != std::string::npos) message.replace(at, path.size(), "F");
  return message;
}

ClusterPlan plan_of(const std::string& text) {
  const Result<ClusterSpec> spec = load_cluster_file(write_file(text));
  if (!spec.ok()) ADD_FAILURE() << spec.error().message;
  Result<ClusterPlan> plan = plan_cluster(*spec, "info");
  if (!plan.ok()) ADD_FAILURE() << plan.error().message;
  return std::move(plan).value();
}

std::string after(const ProcessSpec& process, const std::string& name) {
  const auto found = std::find(process.arguments.begin(), process.arguments.end(), name);
  return found == process.arguments.end() ? "" : *(found + 1);
}

TEST(ClusterFile, DerivesPortsNamesAndCommandLines) {
  const ClusterPlan plan = plan_of(
      "model: m\noptions: {max-num-seqs: 3, block_size: 16}\n"
      "workers:\n  - {role: prefill, count: 2}\n  - {role: decode, name: d, port: 9000, kv_port: 9100, options: "
      "{max-num-seqs: 7}}\n"
      "router: {policy: round_robin}\n");
  ASSERT_EQ(plan.processes.size(), 4u);
  EXPECT_EQ(plan.processes[0].name, "prefill-0");
  EXPECT_EQ(plan.processes[1].port, 8101);
  EXPECT_EQ(plan.processes[1].kv_port, 14580);
  EXPECT_EQ(plan.processes[2].name, "d");
  EXPECT_EQ(plan.processes[2].kv_port, 9100);
  EXPECT_EQ(after(plan.processes[0], "--max-num-seqs"), "3");
  EXPECT_EQ(after(plan.processes[2], "--max-num-seqs"), "7");
  EXPECT_EQ(after(plan.processes[2], "--block-size"), "16");
  EXPECT_EQ(after(plan.processes[2], "--log-name"), "d");
  const nlohmann::json config = nlohmann::json::parse(after(plan.processes[0], "--kv-transfer-config"));
  EXPECT_EQ(config["kv_role"], "kv_producer");
  EXPECT_EQ(config["kv_port"], 14579);
  EXPECT_EQ(config["engine_id"], "prefill-0");
  EXPECT_EQ(nlohmann::json::parse(after(plan.processes[2], "--kv-transfer-config"))["kv_role"], "kv_consumer");
  EXPECT_EQ(plan.entrance().url(), "http://127.0.0.1:8000");
  const std::vector<std::string> tail(plan.entrance().arguments.end() - 5, plan.entrance().arguments.end());
  EXPECT_EQ(tail, (std::vector<std::string>{"--prefill", "http://127.0.0.1:8100", "http://127.0.0.1:8101", "--decode",
                                            "http://127.0.0.1:9000"}));
  EXPECT_EQ(after(plan.entrance(), "--policy"), "round_robin");
  // Every command line is one that the program takes.
  for (const ProcessSpec& process : plan.processes) EXPECT_TRUE(parse_command_line(process.arguments).ok());
  EXPECT_NE(describe_plan(plan, "run").find("http://127.0.0.1:9000"), std::string::npos);
}

TEST(ClusterFile, OneWorkerThatServesAloneNeedsNoRouter) {
  const ClusterPlan plan = plan_of("model: m\nworkers: [{role: both}]\n");
  ASSERT_EQ(plan.processes.size(), 1u);
  EXPECT_EQ(plan.entrance().port, 8000);
  EXPECT_EQ(after(plan.entrance(), "--kv-transfer-config"), "");
  const ClusterPlan two = plan_of("model: m\nworkers: [{role: both, count: 2}]\n");
  ASSERT_EQ(two.processes.size(), 3u);
  EXPECT_EQ(two.processes[0].port, 8300);
  EXPECT_EQ(after(two.entrance(), "--decode"), "http://127.0.0.1:8300");
  EXPECT_EQ(plan_of("model: m\nworkers: [{role: both}]\nrouter: {port: 8001}\n").processes.size(), 2u);
}

TEST(ClusterFile, KeepsExtraTransferSettings) {
  const std::string file =
      "model: m\nworkers:\n"
      "  - {role: prefill, options: {kv-transfer-config: {kv_connector_extra_config: {a: 1}}}}\n  - {role: decode}\n";
  EXPECT_EQ(nlohmann::json::parse(
                after(plan_of(file).processes[0], "--kv-transfer-config"))["kv_connector_extra_config"]["a"],
            1);
  EXPECT_EQ(error_in("model: m\nworkers:\n  - {role: prefill, options: {kv-transfer-config: {kv_role: kv_both}}}\n"
                     "  - {role: decode}\n"),
            "F:3: kv-transfer-config.kv_role follows from role, kv_port and name of worker 'prefill'; remove it");
}

TEST(ClusterFile, SaysWhatIsWrongAndWhere) {
  const std::string good = "model: m\nworkers:\n  - {role: prefill}\n  - {role: decode}\n";
  EXPECT_EQ(error_in(good), "no error");
  EXPECT_EQ(error_in("workers: []\n"), "F: 'model' is missing; give the model's directory");
  EXPECT_EQ(error_in("model: m\n"), "F: 'workers' must be a list with at least one worker");
  EXPECT_EQ(error_in("model: m\nworkers: []\n"), "F: 'workers' must be a list with at least one worker");
  EXPECT_EQ(error_in("modell: m\n"), "F:1: unknown key 'modell' in the cluster file; did you mean 'model'?");
  EXPECT_EQ(error_in(good + "router: {prot: 1}\n"), "F:5: unknown key 'prot' in router; did you mean 'port'?");
  EXPECT_EQ(error_in("model: m\nworkers:\n  - {role: prefil}\n"), "F:3: role 'prefil' must be prefill, decode or both");
  EXPECT_EQ(error_in("model: m\nworkers:\n  - {name: x}\n"), "F:3: 'role' is missing; it is prefill, decode or both");
  EXPECT_EQ(error_in("model: m\nworkers:\n  - role: both\n    count: 0\n"),
            "F:4: 'count' is 0; it must be an integer from 1 to 64");
  EXPECT_EQ(error_in("model: m\nworkers:\n  - role: both\n    port: [1]\n"),
            "F:4: 'port' is not a number; it must be an integer from 1 to 65535");
  EXPECT_EQ(error_in("model: m\nworkers:\n  - role: both\n    options:\n      max-num-seq: 4\n"),
            "F:5: unknown option 'max-num-seq'; did you mean 'max-num-seqs'?");
  EXPECT_EQ(error_in("model: m\nworkers:\n  - role: both\n    options:\n      port: 4\n"),
            "F:5: 'port' follows from the cluster file and cannot be an option");
  EXPECT_EQ(error_in("model: m\noptions: {max-num-seqs: lots}\nworkers: [{role: both}]\n"),
            "F:2: --max-num-seqs is 'lots'; it must be an integer from 1 to 65536");
  EXPECT_EQ(error_in("model: m\nworkers:\n  - {role: both, host: 10.0.0.1/8}\n"),
            "F:3: host '10.0.0.1/8' is neither a name nor an address");
  EXPECT_EQ(error_in("model: m\nworkers:\n  - {role: both, name: a/b}\n"),
            "F:3: name 'a/b' may have letters, digits, '-' and '_'");
  EXPECT_EQ(error_in("model: m\nworkers: [{role: both}, {role: both, name: worker}]\n"),
            "F: two processes are named 'worker'; give each group of workers its own name");
  EXPECT_EQ(error_in("model: m\nmodel: n\n"), "F:2: 'model' is given twice");
  EXPECT_EQ(error_in("model: m\nworkers: [{role: both, kv_port: 5}]\n"),
            "F:2: worker 'worker' has a kv_port but role both hands no KV over");
}

std::string refusal_to_start(const std::string& text) {
  const std::string path = write_file(text);
  const Status status = check_startable_here(*load_cluster_file(path));
  return status.ok() ? "ok" : status.error().message.substr(path.size());
}

TEST(ClusterFile, StartsOnlyWhatIsOnThisHost) {
  EXPECT_EQ(refusal_to_start("model: m\nworkers: [{role: both, host: localhost}]\n"), "ok");
  const std::string rest =
      " is not a loopback address; `tandem up` starts processes on this host only. Start it there by hand, with the "
      "command line that `tandem up --dry-run` prints; `tandem check` examines the hosts";
  EXPECT_EQ(refusal_to_start("model: m\nworkers:\n  - {role: both, host: 10.0.0.1}\n"),
            ":3: host '10.0.0.1' of worker 'worker'" + rest);
  EXPECT_EQ(refusal_to_start("model: m\nworkers: [{role: both}]\nrouter: {host: gate.example}\n"),
            ":3: host 'gate.example' of the router" + rest);
  EXPECT_EQ(refusal_to_start("model: m\nworkers: [{role: both, nodes: [127.0.0.1, h2]}]\n"),
            ":2: host 'h2' of worker 'worker'" + rest);
}

TEST(ClusterFile, SpreadsRanksOverNodes) {
  const ClusterPlan plan = plan_of(
      "model: m\noptions: {data-parallel-size: 4, enable-expert-parallel: true}\n"
      "workers:\n  - {role: prefill, nodes: [10.0.0.1, 10.0.0.2]}\n  - {role: decode, host: 10.0.0.3}\n");
  ASSERT_EQ(plan.processes.size(), 4u);
  const ProcessSpec& first = plan.processes[0];
  const ProcessSpec& second = plan.processes[1];
  EXPECT_EQ(first.name, "prefill-0");
  EXPECT_EQ(after(first, "--data-parallel-size-local"), "2");
  EXPECT_EQ(after(first, "--data-parallel-address"), "10.0.0.1");
  EXPECT_EQ(after(first, "--data-parallel-start-rank"), "");
  EXPECT_EQ(after(second, "--host"), "10.0.0.2");
  EXPECT_EQ(after(second, "--data-parallel-start-rank"), "2");
  EXPECT_EQ(after(second, "--data-parallel-rpc-port"), "29550");
  EXPECT_NE(std::find(second.arguments.begin(), second.arguments.end(), "--headless"), second.arguments.end());
  EXPECT_EQ(nlohmann::json::parse(after(second, "--kv-transfer-config"))["kv_ip"], "10.0.0.2");
  std::vector<std::string> ports;
  for (const ProcessSpec& process : plan.processes) {
    for (const PortUse& used : list_ports(process)) {
      ports.push_back(fmt::format("{} {} {}", process.name, used.port, used.what));
    }
  }
  EXPECT_EQ(ports, (std::vector<std::string>{
                       "prefill-0 8100 port", "prefill-0 14579 kv_port of rank 0", "prefill-0 14580 kv_port of rank 1",
                       "prefill-0 29550 data-parallel-rpc-port", "prefill-1 14581 kv_port of rank 2",
                       "prefill-1 14582 kv_port of rank 3", "decode 8200 port", "decode 14583 kv_port of rank 0",
                       "decode 14584 kv_port of rank 1", "decode 14585 kv_port of rank 2",
                       "decode 14586 kv_port of rank 3", "router 8000 port"}));
  EXPECT_EQ(after(plan.entrance(), "--prefill"), "http://10.0.0.1:8100");  // a headless node has no endpoint
  EXPECT_EQ(after(plan.entrance(), "--decode"), "http://10.0.0.3:8200");
  for (const ProcessSpec& process : plan.processes) EXPECT_TRUE(parse_command_line(process.arguments).ok());

  EXPECT_EQ(error_in("model: m\nworkers: [{role: both, nodes: [a, b], options: {data-parallel-size: 3}}]\n"),
            "F:2: 2 nodes cannot share data-parallel-size 3 evenly; give a multiple of 2");
  EXPECT_EQ(error_in("model: m\nworkers: [{role: both, nodes: [a, b], options: {headless: true}}]\n"),
            "F:2: 'headless' follows from 'nodes' of worker 'worker' and cannot be an option");
  EXPECT_EQ(error_in("model: m\nworkers: [{role: both, host: c, nodes: [a, b]}]\n"),
            "F:2: 'host' and 'nodes' exclude each other");
  EXPECT_EQ(error_in("model: m\nworkers: [{role: both, nodes: [a, a]}]\n"), "F:2: 'nodes' has the same host twice");
}

TEST(ClusterFile, HostsHavePortsOfTheirOwn) {
  EXPECT_EQ(
      error_in(
          "model: m\nworkers: [{role: prefill, host: a, port: 8000, kv_port: 1}, {role: decode, host: b, port: 8000, "
          "kv_port: 1}]\n"),
      "no error");
  EXPECT_EQ(
      error_in("model: m\nworkers: [{role: prefill, host: a, port: 8001}, {role: decode, host: a, port: 8001}]\n"),
      "F: prefill's port and decode's port are both 8001; change one");
}

TEST(ClusterFile, RefusesRolesThatCannotWork) {
  EXPECT_EQ(error_in("model: m\nworkers: [{role: prefill}]\n"),
            "F: 1 prefill worker(s) but no decode worker; add one with role: decode");
  EXPECT_EQ(error_in("model: m\nworkers: [{role: decode, count: 2}]\n"),
            "F: 2 decode worker(s) but no prefill worker; add one with role: prefill, or use role: both");
  EXPECT_EQ(error_in("model: m\nworkers: [{role: decode}, {role: prefill}, {role: both}]\n"),
            "F: role both serves whole requests and cannot be mixed with prefill and decode");
}

TEST(ClusterFile, RefusesOverlappingPorts) {
  EXPECT_EQ(error_in("model: m\nworkers: [{role: prefill, port: 8000}, {role: decode}]\n"),
            "F: prefill's port and router's port are both 8000; change one");
  EXPECT_EQ(error_in("model: m\nworkers: [{role: prefill, count: 3, port: 9000}, {role: decode, kv_port: 9002}]\n"),
            "F: prefill-2's port and decode's kv_port are both 9002; change one");
  EXPECT_EQ(error_in("model: m\nworkers: [{role: both, count: 2, port: 65535}]\n"),
            "F: worker-1's port would be 65536, above 65535");
}

TEST(Examples, AreValid) {
  for (const char* name : {"local-1p1d.yaml", "ranks-1p1d.yaml", "single.yaml"}) {
    const Result<ClusterSpec> spec = load_cluster_file(fmt::format("{}/examples/{}", TANDEM_SOURCE_DIR, name));
    ASSERT_TRUE(spec.ok()) << spec.error().message;
    const Result<ClusterPlan> plan = plan_cluster(*spec, "info");
    ASSERT_TRUE(plan.ok()) << plan.error().message;
    for (const ProcessSpec& process : plan->processes) {
      const Result<CommandLine> line = parse_command_line(process.arguments);
      EXPECT_TRUE(line.ok()) << line.error().message;
    }
    EXPECT_EQ(plan->entrance().port, 8000);
  }
}

TEST(RestartPolicy, DoublesUpToFiveSecondsAndGivesUp) {
  RestartPolicy policy;
  std::vector<int64_t> delays;
  for (int i = 0; i < RestartPolicy::kMaxFailures; ++i) delays.push_back(policy.next_delay_ms(0).value());
  EXPECT_EQ(delays, (std::vector<int64_t>{200, 400, 800, 1600, 3200, 5000, 5000, 5000, 5000, 5000}));
  EXPECT_EQ(policy.next_delay_ms(0), std::nullopt);
  EXPECT_EQ(policy.next_delay_ms(10'000), 200);  // it was stable: all is forgiven
}

TEST(RestartPolicy, WhoBecomesReadyIsNeverGivenUp) {
  RestartPolicy policy;
  for (int i = 0; i < 5 * RestartPolicy::kMaxFailures; ++i) ASSERT_TRUE(policy.next_delay_ms(9'999).has_value());
  EXPECT_EQ(policy.next_delay_ms(1), 5000);
  for (int i = 0; i < RestartPolicy::kMaxFailures; ++i) ASSERT_TRUE(policy.next_delay_ms(0).has_value());
  EXPECT_EQ(policy.next_delay_ms(0), std::nullopt);
}

}  // namespace
}  // namespace tandem::cluster
