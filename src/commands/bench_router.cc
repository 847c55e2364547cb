// tandem bench router: a router by itself, between instant workers and a load.
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "src/bench/router_bench.h"
#include "src/cluster/process.h"
#include "src/commands/client_common.h"
#include "src/commands/commands.h"

namespace tandem::commands {

int run_bench_router(const Options& options) {
  const std::filesystem::path log =
      std::filesystem::temp_directory_path() / fmt::format("tandem-bench-router-{}.log", ::getpid());
  const bench::RouterBenchOptions bench{.program = cluster::kOwnProgram,
                                        .model = options.text("model"),
                                        .log_path = log.string(),
                                        .pairs = options.flag("pairs"),
                                        .num_workers = static_cast<int>(options.integer("num-workers")),
                                        .input_len = options.integer("input-len"),
                                        .output_len = options.integer("output-len"),
                                        .token_gap_ms = options.number("token-gap-ms"),
                                        .seconds = options.number("duration-s"),
                                        .concurrency = options.integer("max-concurrency"),
                                        .rate = options.number("request-rate"),
                                        .slope_seconds = options.number("memory-s"),
                                        .seed = static_cast<uint64_t>(options.integer("seed"))};
  const Result<bench::RouterBenchResult> result = bench::run_router_bench(bench);
  std::error_code ignored;
  std::filesystem::remove(log, ignored);  // a fault's message holds its last lines
  if (!result.ok()) return fail_with(result.error());
  std::fputs(bench::router_report_as_text(bench, *result).c_str(), stdout);
  const std::string& path = options.text("output-json");
  if (path.empty()) return 0;
  std::ofstream file(path);
  file << bench::router_report_as_json(bench, *result) << "\n";
  file.close();
  if (!file) return fail_with(make_error(ErrorKind::kUnavailable, "{}: cannot be written; check --output-json", path));
  return 0;
}

}  // namespace tandem::commands
