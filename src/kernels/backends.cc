// Which backends there are, and which of them this machine can run.
#include <fmt/ranges.h>

#include <memory>

#include "src/kernels/ops.h"
#include "src/kernels/ref/ref_ops.h"

namespace tandem::kernels {

std::vector<std::string> available_backends() { return {"ref"}; }

Result<std::unique_ptr<Ops>> make_ops(std::string_view name, int num_threads) {
  constexpr int kMaxThreads = 256;
  if (num_threads < 0 || num_threads > kMaxThreads) {
    return invalid_argument("num_threads", "{} threads asked, must be 0 (one per core) to {}", num_threads,
                            kMaxThreads);
  }
  const std::vector<std::string> backends = available_backends();
  const std::string_view chosen = name == "auto" ? std::string_view(backends.front()) : name;
  if (chosen == "ref") return std::unique_ptr<Ops>(std::make_unique<RefOps>());
  return invalid_argument("backend", "backend \"{}\" is not possible here, choose auto or one of {}", name,
                          fmt::join(backends, ", "));
}

}  // namespace tandem::kernels
