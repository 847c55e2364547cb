// tandem bench kernels: every kernel beside the limits of this machine.
#include "src/commands/client_common.h"
#include "src/commands/commands.h"
#include "src/kernels/bench/kernels_bench.h"

namespace tandem::commands {

int run_bench_kernels(const Options& options) {
  const std::string& isa = options.text("cpu-isa");
  const kernels::KernelsBenchOptions bench{.isa = isa == "all" || isa == "auto" ? isa : "cpu-" + isa,
                                           .threads = static_cast<int>(options.integer("threads")),
                                           .filter = options.text("filter")};
  const Status status = kernels::run_kernels_bench(bench);
  return status.ok() ? 0 : fail_with(status.error());
}

}  // namespace tandem::commands
