// Measures the kernels beside the machine's limits, in the same run. `tandem bench kernels` and the program kernels_bench
// (which links nothing above src/kernels) call it; the lines it prints are those of Bench::run_all.
#pragma once

#include <string>
#include <string_view>

#include "src/base/result.h"

namespace tandem::kernels {

struct KernelsBenchOptions {
  std::string isa = "all";  // "all" that this machine has, one after another; "auto": the best; or a name
  int threads = 0;          // 0: one per core
  std::string filter;       // only lines whose name contains it
};

// Prints to stdout. An error names an instruction set that this machine cannot run.
Status run_kernels_bench(const KernelsBenchOptions& options);

// The machine's read bandwidth as `threads` threads reach it with the instructions of that backend, in 1e9 bytes per
// second; the plain backend has no such limit and gives that of the best one.
double measure_read_gbytes(std::string_view backend, int threads);

}  // namespace tandem::kernels
