// The tandem program: a table of subcommands.
#include <cstdio>
#include <string>
#include <vector>

#include "src/base/options.h"
#include "src/commands/commands.h"

namespace {

using tandem::Subcommand;

struct Row {
  Subcommand command;
  int (*run)(const tandem::Options&);
};

constexpr Row kRows[] = {
    {Subcommand::kServe, tandem::commands::run_serve},
    {Subcommand::kRoute, tandem::commands::run_route},
    {Subcommand::kUp, tandem::commands::run_up},
    {Subcommand::kCheck, tandem::commands::run_check},
    {Subcommand::kCheckAgent, tandem::commands::run_check_agent},
    {Subcommand::kChat, tandem::commands::run_chat},
    {Subcommand::kBenchServe, tandem::commands::run_bench_serve},
    {Subcommand::kBenchKernels, tandem::commands::run_bench_kernels},
    {Subcommand::kBenchThroughput, tandem::commands::run_bench_throughput},
    {Subcommand::kBenchLatency, tandem::commands::run_bench_latency},
    {Subcommand::kBenchRouter, tandem::commands::run_bench_router},
    {Subcommand::kBenchA2a, tandem::commands::run_bench_a2a},
    {Subcommand::kBenchKv, tandem::commands::run_bench_kv},
    {Subcommand::kQuantize, tandem::commands::run_quantize},
    {Subcommand::kEplb, tandem::commands::run_eplb},
    {Subcommand::kSim, tandem::commands::run_sim},
    {Subcommand::kOptions, tandem::commands::run_options},
};

constexpr int kWrongUsage = 2;

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + (argc > 0 ? 1 : 0), argv + argc);
  const tandem::Result<tandem::CommandLine> line = tandem::parse_command_line(arguments);
  if (!line.ok()) {
    std::fprintf(stderr, "%s\n", line.error().message.c_str());
    return kWrongUsage;
  }
  if (!line->text_to_print.empty()) {
    std::fputs(line->text_to_print.c_str(), stdout);
    return 0;
  }
  for (const Row& row : kRows) {
    if (row.command == line->command) return row.run(line->options);
  }
  return kWrongUsage;
}
