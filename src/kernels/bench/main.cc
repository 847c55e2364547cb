//   kernels_bench [isa [threads [filter]]]
// The same as `tandem bench kernels`, built without the rest of the program.
#include <cstdio>
#include <cstdlib>

#include "src/kernels/bench/kernels_bench.h"

int main(int argc, char** argv) {
  tandem::kernels::KernelsBenchOptions options;
  options.isa = argc > 1 ? argv[1] : "auto";
  options.threads = argc > 2 ? std::atoi(argv[2]) : 0;
  options.filter = argc > 3 ? argv[3] : "";
  const tandem::Status status = tandem::kernels::run_kernels_bench(options);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.error().message.c_str());
  return status.ok() ? 0 : 1;
}
