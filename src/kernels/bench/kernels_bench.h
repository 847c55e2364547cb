// Measures the kernels beside the machine's limits: `tandem bench kernels`. The lines it prints are those of
// Bench::run_all.
#pragma once

#include <string>

#include "src/base/result.h"

namespace tandem::kernels {

struct KernelsBenchOptions {
  std::string isa = "all";  // "all" that this machine has, one after another; "auto": the best; or a name
  int threads = 0;          // 0: one per core
  std::string filter;       // only lines whose name contains it
};

// Prints to stdout. An error names an instruction set that this machine cannot run.
Status run_kernels_bench(const KernelsBenchOptions& options);

}  // namespace tandem::kernels
