// tandem eplb: a placement of experts from recorded loads, without a server.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/commands/client_common.h"
#include "src/commands/commands.h"
#include "src/eplb/balance.h"
#include "src/eplb/config.h"
#include "src/eplb/load_file.h"
#include "src/eplb/moves.h"
#include "src/eplb/placement_file.h"
#include "src/kernels/ops.h"
#include "src/model/memory_needs.h"
#include "src/model/model.h"

namespace tandem::commands {
namespace {

struct Task {
  std::vector<int64_t> layers;  // of the model
  eplb::LoadSeries window;
  eplb::Layout layout;
  eplb::Placement current;
  eplb::Policy policy = eplb::Policy::kDefault;
  int64_t expert_bytes = 0;  // of one expert's weights; 0: not known
};

// What --eplb-config says; each field may instead be an option, but not both.
struct Choices {
  eplb::Policy policy = eplb::Policy::kDefault;
  std::optional<int64_t> redundant;
  int64_t window_steps = 0;
};

Result<Choices> read_choices(const Options& options) {
  Choices choices;
  TANDEM_ASSIGN(choices.policy, eplb::parse_policy(options.text("policy")));
  if (options.is_set("redundant")) choices.redundant = options.integer("redundant");
  const std::string& text = options.text("eplb-config");
  if (text.empty()) return choices;
  TANDEM_ASSIGN(const eplb::EplbConfig config, eplb::parse_eplb_config(text));
  const nlohmann::json given = nlohmann::json::parse(text);
  for (const auto& [field, option] : {std::pair{"policy", "policy"}, std::pair{"num_redundant_experts", "redundant"}}) {
    if (!given.contains(field) || !options.is_set(option)) continue;
    return invalid_argument(option, "--{} and --eplb-config.{} are both given; leave one out", option, field);
  }
  if (given.contains("policy")) choices.policy = config.policy;
  if (given.contains("num_redundant_experts")) choices.redundant = config.num_redundant_experts;
  if (given.contains("window_size")) choices.window_steps = config.window_size;
  return choices;
}

Result<eplb::LoadSeries> read_window(const Options& options, const eplb::RecordedLoad& recorded,
                                     const Choices& choices) {
  const std::string& phase = options.text("phase");
  eplb::LoadSeries window = recorded.window(phase != "generated", phase != "prompt", choices.window_steps);
  if (window.empty()) {
    return make_error(ErrorKind::kInvalidArgument,
                      "{}: no {}tokens are recorded; record under load, or take another "
                      "--phase",
                      options.text("load"), phase == "both" ? "" : phase + " ");
  }
  std::printf("%s: %zu layers x %ld experts, %ld steps in %zu samples, %s tokens\n", options.text("load").c_str(),
              recorded.header.layers.size(), static_cast<long>(recorded.header.num_experts),
              static_cast<long>(recorded.total_steps), window.size(), phase == "both" ? "all" : phase.c_str());
  return window;
}

// A placement that does not belong to the loads or the options is refused.
Status use_current(const eplb::StoredPlacement& stored, const Options& options, const Choices& choices,
                   const eplb::LoadFileHeader& header, Task& task) {
  const eplb::Placement& placement = stored.placement;
  const int64_t redundant = placement.num_slots() - placement.num_experts();
  const std::string& path = options.text("current");
  const auto differs = [&](const char* what, int64_t here, int64_t there, const std::string& other) -> Status {
    if (here == there) return {};
    return make_error(ErrorKind::kInvalidArgument, "{}: is for {} {}, {} has {}; they must be the same", path, here,
                      what, other, there);
  };
  TANDEM_TRY(differs("experts", placement.num_experts(), header.num_experts, options.text("load")));
  if (stored.layers != header.layers) {
    return make_error(ErrorKind::kInvalidArgument, "{}: is for layers {}, {} has layers {}; they must be the same",
                      path, fmt::join(stored.layers, ","), options.text("load"), fmt::join(header.layers, ","));
  }
  if (options.is_set("ranks")) {
    TANDEM_TRY(differs("ranks", placement.num_ranks(), options.integer("ranks"), "--ranks"));
  }
  if (choices.redundant) TANDEM_TRY(differs("redundant experts", redundant, *choices.redundant, "the command line"));
  task.layout.num_ranks = placement.num_ranks();
  task.layout.num_redundant = redundant;
  task.current = placement;
  return {};
}

// As the model would be packed here; no weight is read.
Result<int64_t> measure_expert(const std::string& path, const eplb::LoadFileHeader& header) {
  TANDEM_ASSIGN(const model::ModelConfig config, model::load_config(path));
  if (config.moe.num_experts != header.num_experts) {
    return make_error(ErrorKind::kInvalidArgument,
                      "{}: has {} experts, the recorded load {}; they do not belong together", path,
                      config.moe.num_experts, header.num_experts);
  }
  TANDEM_ASSIGN(const std::unique_ptr<kernels::Ops> ops, kernels::make_ops("auto", 1));
  model::LoadOptions load;
  load.path = path;
  load.max_num_batched_tokens = load.max_num_seqs = 1;
  int64_t bytes = -1;
  load.on_sized = [&bytes](const model::MemoryNeeds& needs) -> Status {
    bytes = needs.expert_bytes;
    return make_error(ErrorKind::kAborted, "sized");  // the load ends here
  };
  const Result<std::unique_ptr<model::Model>> loaded = model::load_model(*ops, load);
  if (bytes < 0) return loaded.error();
  return bytes / (std::ssize(header.layers) * header.num_experts);
}

Result<Task> read_task(const Options& options) {
  if (options.text("load").empty()) {
    return invalid_argument("load", "--load is missing; give a file of `tandem serve --record-expert-load`");
  }
  TANDEM_ASSIGN(const Choices choices, read_choices(options));
  TANDEM_ASSIGN(eplb::RecordedLoad recorded, eplb::read_load_file(options.text("load")));
  Task task;
  task.policy = choices.policy;
  task.layers = recorded.header.layers;
  task.layout = {recorded.header.num_experts, choices.redundant.value_or(0), options.integer("ranks"),
                 options.integer("nodes"), options.integer("groups")};
  if (!options.text("current").empty()) {
    TANDEM_ASSIGN(const eplb::StoredPlacement stored, eplb::read_placement_file(options.text("current")));
    TANDEM_TRY(use_current(stored, options, choices, recorded.header, task));
  } else if (!options.is_set("ranks")) {
    return invalid_argument("ranks", "--ranks is missing; say how many ranks share the experts, or give --current");
  }
  if (Status checked = eplb::check_layout(task.layout); !checked.ok()) {
    return invalid_argument(checked.error().param, "--{}: {}", checked.error().param, checked.error().message);
  }
  if (options.text("current").empty()) {
    task.current = eplb::Placement::initial(std::ssize(task.layers), task.layout);
  }
  if (!options.text("model").empty()) {
    TANDEM_ASSIGN(task.expert_bytes, measure_expert(options.text("model"), recorded.header));
  }
  TANDEM_ASSIGN(task.window, read_window(options, recorded, choices));
  return task;
}

const char* describe_scope(const Task& task) {
  if (task.policy != eplb::Policy::kDefault) return "all ranks alike";
  return task.layout.is_hierarchical() ? "groups kept on nodes" : "all ranks alike";
}

std::string bytes_text(double bytes) {
  constexpr double kMiB = 1 << 20;
  return bytes < kMiB ? fmt::format("{:.1f} KiB", bytes / 1024) : fmt::format("{:.1f} MiB", bytes / kMiB);
}

void print_tables(const Task& task, const eplb::Placement& next, double plan_ms) {
  const eplb::ExpertLoad load = eplb::sum_of(task.window);
  const eplb::BalanceReport before = eplb::report_balance(load, task.current);
  const eplb::BalanceReport after = eplb::report_balance(load, next);
  const eplb::MovePlan moves = eplb::plan_moves(task.current, next, task.layout.num_nodes);
  std::printf("policy %s (%s): %ld ranks of %ld slots, planned in %.1f ms\n\n", eplb::policy_name(task.policy),
              describe_scope(task), static_cast<long>(task.layout.num_ranks),
              static_cast<long>(task.layout.slots_per_rank()), plan_ms);
  std::printf("  layer        tokens  before   after   moves\n");
  for (size_t l = 0; l < task.layers.size(); ++l) {
    int64_t tokens = 0;
    for (const int64_t count : load.layer(static_cast<int64_t>(l))) tokens += count;
    std::printf("  %5ld %13ld  %6.3f  %6.3f  %6zu\n", static_cast<long>(task.layers[l]), static_cast<long>(tokens),
                before.layers[l], after.layers[l], moves.layers[l].remote.size());
  }
  const auto print_line = [](const char* name, double was, double is) {
    std::printf("  %-19s  %6.3f  %6.3f\n", name, was, is);
  };
  print_line("overall", before.overall, after.overall);
  print_line("p50", before.p50, after.p50);
  print_line("p99", before.p99, after.p99);
  print_line("worst", before.worst, after.worst);
  const int64_t remote = moves.num_remote();
  std::printf("\n%ld of %ld slots get another expert from another rank, %ld from their own", static_cast<long>(remote),
              static_cast<long>(task.layout.num_slots() * std::ssize(task.layers)),
              static_cast<long>(moves.num_local()));
  if (task.expert_bytes > 0) {
    const double each = static_cast<double>(task.expert_bytes);
    std::printf("; %s between ranks (%s an expert)", bytes_text(each * static_cast<double>(remote)).c_str(),
                bytes_text(each).c_str());
  }
  std::printf("\n");
}

// Placements and the time they took, in ms.
std::pair<eplb::Placement, double> place(const Task& task, eplb::Policy policy) {
  const SteadyClock clock;
  const int64_t begin_us = clock.now_us();
  eplb::Placement next = eplb::rebalance(policy, {task.window, task.layout, task.current});
  return {std::move(next), static_cast<double>(clock.now_us() - begin_us) * 1e-3};
}

void print_times(const Task& task) {
  constexpr int kRuns = 5;
  for (const eplb::Policy policy : {eplb::Policy::kDefault, eplb::Policy::kSwift, eplb::Policy::kFlash}) {
    double best_ms = place(task, policy).second;
    for (int i = 1; i < kRuns; ++i) best_ms = std::min(best_ms, place(task, policy).second);
    std::printf("time of %-8s %8.2f ms, %.3f ms a layer\n", eplb::policy_name(policy), best_ms,
                best_ms / static_cast<double>(task.layers.size()));
  }
}

Status run(const Options& options) {
  TANDEM_ASSIGN(const Task task, read_task(options));
  auto [next, plan_ms] = place(task, task.policy);
  const bool is_from_scratch = task.policy == eplb::Policy::kDefault && options.text("current").empty();
  if (!is_from_scratch) eplb::keep_slots(task.current, next);
  print_tables(task, next, plan_ms);
  if (options.flag("time")) print_times(task);
  const std::string& path = options.text("output");
  if (path.empty()) return {};
  std::ofstream file(path, std::ios::binary);
  file << eplb::format_placement({task.layers, std::move(next)});
  file.close();
  if (!file) return make_error(ErrorKind::kUnavailable, "{}: cannot be written; check --output", path);
  std::printf("placement in %s\n", path.c_str());
  return {};
}

}  // namespace

int run_eplb(const Options& options) {
  init_log(LogLevel::kError, "");
  const Status status = run(options);
  return status.ok() ? 0 : fail_with(status.error());
}

}  // namespace tandem::commands
