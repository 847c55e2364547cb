#include "src/kernels/cpu/isa_choice.h"

namespace tandem::kernels::cpu {
namespace {

// These ask the processor and whether the system saves the registers.
// F16C is older than AVX2.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

// VBMI decodes fp8; of the processors with BF16 only the first (Cooper Lake) lacks it.
bool has_avx512_bf16() {
  return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}

bool is_amd() { return __builtin_cpu_is("amd"); }

}  // namespace

std::vector<const Isa*> possible_isas() {
  std::vector<const Isa*> isas;
  // A dot of pairs beats f32 products on AMD; Sapphire Rapids issues it every other cycle, half as many products as f32
  // (measured: 78 against 160 GFLOP/s of one core). Chosen by vendor, never by a measurement at start: equal machines
  // must choose alike, or their results would differ.
  if (has_avx512_bf16() && is_amd()) isas.push_back(&isa_avx512_bf16());
  if (has_avx512_vnni()) isas.push_back(&isa_avx512_vnni());
  if (has_avx512()) isas.push_back(&isa_avx512());
  if (has_avx512_bf16() && !is_amd()) isas.push_back(&isa_avx512_bf16());
  if (has_avx2()) isas.push_back(&isa_avx2());
  return isas;
}

const Isa* find_isa(std::string_view name) {
  for (const Isa* isa : possible_isas()) {
    if (isa->name == name) return isa;
  }
  return nullptr;
}

}  // namespace tandem::kernels::cpu
