// AVX2 with FMA.
// clang-format off: each of these uses the functions of those before it.
#include "src/kernels/cpu/simd_avx2.h"
#include "src/kernels/cpu/rows_inl.h"
#include "src/kernels/cpu/gemm_inl.h"
#include "src/kernels/cpu/integer_rows_inl.h"
#include "src/kernels/cpu/integer_gemm_inl.h"
#include "src/kernels/cpu/attention_inl.h"
#include "src/kernels/cpu/kv_rows_inl.h"
#include "src/kernels/cpu/limits_inl.h"
#include "src/kernels/cpu/isa_table_inl.h"
// clang-format on

namespace tandem::kernels::cpu {

const Isa& isa_avx2() {
  static constexpr Isa kIsa = make_table("cpu-avx2");
  return kIsa;
}

}  // namespace tandem::kernels::cpu
