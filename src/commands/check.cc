// tandem check, tandem check-agent: whether the hosts of a cluster file fit together, before anything is started.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "src/base/log.h"
#include "src/base/memory_info.h"
#include "src/check/agent.h"
#include "src/check/model_hash.h"
#include "src/check/run.h"
#include "src/cluster/cluster_file.h"
#include "src/commands/client_common.h"
#include "src/commands/commands.h"
#include "src/commands/rank.h"

namespace tandem::commands {
namespace {

// What the options would load here; no weight is read.
Status size_model(const RankConfig& config, int64_t num_ranks, int64_t group_size, check::ProcessFacts& facts) {
  TANDEM_ASSIGN(const std::unique_ptr<kernels::Ops> ops, kernels::make_ops(config.backend, config.threads));
  facts.instruction_set = ops->name();
  facts.threads = ops->num_threads() * num_ranks;
  model::LoadOptions load = config.load;
  bool was_sized = false;
  Status fits;
  load.on_sized = [&](const model::MemoryNeeds& all) -> Status {
    was_sized = true;
    model::MemoryNeeds needs = all;
    const int64_t elsewhere = needs.expert_bytes - needs.expert_bytes / group_size;
    needs.expert_bytes -= elsewhere;
    needs.weight_bytes -= elsewhere;
    facts.kv_layout = needs.kv.describe_token();
    const Result<engine::MemoryPlan> plan = engine::plan_memory(needs, config.memory, available_memory());
    if (plan.ok()) facts.memory_bytes = plan->total_bytes * num_ranks;
    if (!plan.ok()) fits = plan.error();
    return make_error(ErrorKind::kAborted, "sized");  // the load ends here
  };
  const Result<std::unique_ptr<model::Model>> loaded = model::load_model(*ops, load);
  if (!was_sized) return loaded.error();
  return fits;
}

Status examine_serve(const std::vector<std::string>& arguments, int64_t num_ranks, check::ProcessFacts& facts) {
  TANDEM_ASSIGN(const CommandLine line, parse_command_line(arguments));
  if (line.command != Subcommand::kServe || !line.text_to_print.empty()) {
    return invalid_argument("", "not a command line of `tandem serve`");
  }
  TANDEM_ASSIGN(const check::ModelHashes hashes, check::hash_model(line.options.text("model")));
  facts.config_hash = hashes.config;
  facts.weights_hash = hashes.weights;
  facts.tokenizer_hash = hashes.tokenizer;
  TANDEM_ASSIGN(const RankConfig config, make_rank_config(line.options));
  if (config.load.format == model::LoadFormat::kDummy) facts.weights_hash.clear();  // they are not read
  // Each data rank starts its tensor ranks. What one of several takes is a little less than is counted here.
  const int64_t tensor_ranks = line.options.integer("tensor-parallel-size");
  return size_model(config, num_ranks * tensor_ranks, line.options.integer("data-parallel-size") * tensor_ranks, facts);
}

check::ProcessFacts examine_process(const std::vector<std::string>& arguments, int64_t num_ranks) {
  check::ProcessFacts facts;
  if (arguments.empty() || arguments.front() == "route") return facts;
  // A request comes from the network: it chooses options and a model's folder, not files to read options from.
  const bool reads_file = std::any_of(arguments.begin(), arguments.end(),
                                      [](const std::string& word) { return word.rfind("--config", 0) == 0; });
  const Status status = reads_file || num_ranks < 1 || num_ranks > 1024
                            ? Status(invalid_argument("config", "--config is not taken from a check"))
                            : examine_serve(arguments, num_ranks, facts);
  if (!status.ok()) facts.fault = status.error().message;
  return facts;
}

}  // namespace

int run_check(const Options& options) {
  init_log(LogLevel::kError, "");
  const Result<cluster::ClusterSpec> spec = cluster::load_cluster_file(options.text("cluster"));
  if (!spec.ok()) return fail_with(spec.error());
  const Result<cluster::ClusterPlan> plan = cluster::plan_cluster(*spec, "info");
  if (!plan.ok()) return fail_with(plan.error());
  check::RunOptions run;
  run.agent_port = options.integer("agent-port");
  run.timeout_ms = static_cast<int64_t>(options.number("timeout-s") * 1000);
  run.examine = examine_process;
  const std::vector<check::Finding> findings = check::run_check(*plan, run);
  if (options.flag("json")) {
    std::printf(
        "%s\n",
        check::findings_as_json(findings).dump(2, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  } else {
    std::fputs(check::format_findings(findings, options.flag("verbose")).c_str(), stdout);
  }
  return check::has_errors(findings) ? 1 : 0;
}

int run_check_agent(const Options& options) {
  init_log(LogLevel::kError, "");
  check::AgentOptions agent;
  agent.host = options.text("host");
  agent.port = options.integer("agent-port");
  agent.lifetime_s = options.number("lifetime-s");
  const Status status = check::run_agent(agent, examine_process, [&](int64_t port) {
    std::printf("answering `tandem check` on %s:%lld for %g s\n", agent.host.c_str(), static_cast<long long>(port),
                agent.lifetime_s);
    std::fflush(stdout);
  });
  return status.ok() ? 0 : fail_with(status.error());
}

}  // namespace tandem::commands
