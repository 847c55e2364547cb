// Which backends there are, and which of them this machine can run.
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>

#include "src/kernels/cpu/cpu_ops.h"
#include "src/kernels/cpu/isa_choice.h"
#include "src/kernels/cpu/topology.h"
#include "src/kernels/ops.h"
#include "src/kernels/ref/ref_ops.h"

namespace tandem::kernels {

std::vector<std::string> available_backends() {
  std::vector<std::string> names;
  for (const cpu::Isa* isa : cpu::possible_isas()) names.emplace_back(isa->name);
  names.emplace_back("ref");
  return names;
}

Result<std::unique_ptr<Ops>> make_ops(std::string_view name, int num_threads) {
  if (num_threads < 0 || num_threads > cpu::kMaxThreads) {
    return invalid_argument("num_threads", "{} threads asked, must be 0 (one per core) to {}", num_threads,
                            cpu::kMaxThreads);
  }
  const std::vector<std::string> backends = available_backends();
  const std::string_view chosen = name == "auto" ? std::string_view(backends.front()) : name;
  if (chosen == "ref") return std::unique_ptr<Ops>(std::make_unique<RefOps>());
  if (const cpu::Isa* isa = cpu::find_isa(chosen); isa != nullptr) {
    const int threads = num_threads == 0 ? std::min(cpu::count_usable_cores(), cpu::kMaxThreads) : num_threads;
    return std::unique_ptr<Ops>(std::make_unique<cpu::CpuOps>(*isa, threads));
  }
  return invalid_argument("backend", "backend \"{}\" is not possible here, choose auto or one of {}", name,
                          fmt::join(backends, ", "));
}

}  // namespace tandem::kernels
