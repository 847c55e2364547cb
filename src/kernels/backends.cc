// Which backends there are, and which of them this machine can run.
#include <fmt/ranges.h>

#include <memory>

#include "src/kernels/cpu/cpu_ops.h"
#include "src/kernels/ops.h"
#include "src/kernels/ref/ref_ops.h"

namespace tandem::kernels {
namespace {

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

struct CpuBackend {
  const char* name;
  bool (*possible)();
  const cpu::Isa& (*isa)();
};

// Best first.
constexpr CpuBackend kCpuBackends[] = {
    {"cpu-avx512-bf16", has_avx512_bf16, cpu::isa_avx512_bf16},
    {"cpu-avx512", has_avx512, cpu::isa_avx512},
    {"cpu-avx2", has_avx2, cpu::isa_avx2},
};

}  // namespace

std::vector<std::string> available_backends() {
  std::vector<std::string> names;
  for (const CpuBackend& backend : kCpuBackends) {
    if (backend.possible()) names.emplace_back(backend.name);
  }
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
  for (const CpuBackend& backend : kCpuBackends) {
    if (chosen != backend.name || !backend.possible()) continue;
    const int threads = num_threads == 0 ? std::min(cpu::count_allowed_cores(), cpu::kMaxThreads) : num_threads;
    return std::unique_ptr<Ops>(std::make_unique<cpu::CpuOps>(backend.isa(), threads));
  }
  return invalid_argument("backend", "backend \"{}\" is not possible here, choose auto or one of {}", name,
                          fmt::join(backends, ", "));
}

}  // namespace tandem::kernels
