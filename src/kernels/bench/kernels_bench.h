// Measures the kernels beside the machine's limits: `tandem bench kernels`. The lines it prints are those of
// Bench::run_all.
#pragma once

#include <string>

#include "src/base/result.h"
#include "src/kernels/bench/limits.h"

namespace tandem::kernels {

// What one measurement runs.
struct BenchWork {
  std::string name;
  int64_t calls = 1;      // of the kernel
  double ops = 0;         // of all calls; a multiply-add counts as two. 0: bytes alone are the kernel's limit
  double bytes = 0;       // that all calls must read, and write where that is not small beside it
  bool of_bytes = false;  // operations are products of 8-bit integers
  // Of those for one operation counted: 16-bit activations take two, so the limit is half.
  int64_t products_per_op = 1;
};
void print_bench_line(const BenchWork& work, const Rates& rates, const std::string& note);

struct KernelsBenchOptions {
  std::string isa = "all";  // "all" that this machine has, one after another; "auto": the best; or a name
  int threads = 0;          // 0: one per core
  std::string filter;       // only lines whose name contains it
};

// The lines there are, whether they were asked for or not.
struct KernelsBenchNames {
  std::vector<std::string> all;
  bool has_selected = false;  // any of them was
};

// Prints to stdout. An error names an instruction set that this machine cannot run.
Result<KernelsBenchNames> run_kernels_bench(const KernelsBenchOptions& options);

}  // namespace tandem::kernels
