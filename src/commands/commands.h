// The subcommands of the tandem program. Each takes its options and returns the exit code: 0 success, 1 a fault that
// was printed, 2 wrong usage.
#pragma once

#include "src/base/options.h"

namespace tandem::commands {

int run_serve(const Options& options);
int run_route(const Options& options);
int run_up(const Options& options);
int run_check(const Options& options);
int run_check_agent(const Options& options);
int run_chat(const Options& options);
int run_bench_serve(const Options& options);
int run_bench_kernels(const Options& options);
int run_bench_throughput(const Options& options);
int run_bench_latency(const Options& options);
int run_bench_router(const Options& options);
int run_bench_a2a(const Options& options);
int run_bench_kv(const Options& options);
int run_quantize(const Options& options);
int run_eplb(const Options& options);
int run_sim(const Options& options);
int run_options(const Options& options);

}  // namespace tandem::commands
