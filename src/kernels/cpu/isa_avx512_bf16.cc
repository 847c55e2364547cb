// AVX-512 with BF16 and VNNI: products of bf16 pairs, summed in f32, and of four bytes, summed in integers, by one
// instruction each.
// clang-format off: each of these uses the functions of those before it.
#define TANDEM_DOT_PAIRS
#define TANDEM_DOT_BYTES
#include "src/kernels/cpu/simd_avx512.h"
#include "src/kernels/cpu/simd_avx512_bf16.h"
#include "src/kernels/cpu/rows_inl.h"
#include "src/kernels/cpu/gemm_inl.h"
#include "src/kernels/cpu/integer_rows_inl.h"
#include "src/kernels/cpu/integer_gemm_inl.h"
#include "src/kernels/cpu/attention_inl.h"
#include "src/kernels/cpu/attention_pairs_inl.h"
#include "src/kernels/cpu/kv_rows_inl.h"
#include "src/kernels/cpu/limits_inl.h"
#include "src/kernels/cpu/isa_table_inl.h"
// clang-format on

namespace tandem::kernels::cpu {

const Isa& isa_avx512_bf16() {
  static constexpr Isa kIsa = make_table("cpu-avx512-bf16");
  return kIsa;
}

}  // namespace tandem::kernels::cpu
