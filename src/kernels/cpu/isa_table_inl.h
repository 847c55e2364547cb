// Fills an Isa with the functions above it in the including file.
#pragma once

namespace tandem::kernels::cpu {
namespace {

#ifdef TANDEM_DOT_PAIRS
constexpr bool kNarrowRows = true;
#else
constexpr bool kNarrowRows = false;
#endif

constexpr Isa make_table(const char* name) {
  Isa isa{};
  isa.name = name;
  isa.gemm_f32 = gemm_f32;
  isa.gemm_bf16 = gemm_bf16;
  isa.narrow_rows = kNarrowRows;
  isa.gemm_int8_a8 = gemm_integers<8, 1>;
  isa.gemm_int8_a16 = gemm_integers<8, 2>;
  isa.gemm_int4_a8 = gemm_integers<4, 1>;
  isa.gemm_int4_a16 = gemm_integers<4, 2>;
  isa.to_integers = to_integers;
  isa.to_bf16 = to_bf16;
  isa.from_bf16 = from_bf16;
  isa.add = add;
  isa.rms_norm = rms_norm;
  isa.silu_mul = silu_mul;
  isa.softmax = softmax;
  isa.sigmoid = sigmoid;
  isa.rotate_halves = rotate_halves;
  isa.rotate_pairs = rotate_pairs;
  isa.weighted_sum = weighted_sum;
  isa.scores = scores;
  isa.softmax_tile = softmax_tile;
  isa.accumulate = accumulate;
  isa.fold = fold;
  isa.finish = finish;
  isa.run_fma = run_fma;
  isa.fma_flops_per_round = kFmaFlopsPerRound;
  isa.run_dot = run_dot;
  isa.dot_ops_per_round = kDotOpsPerRound;
  isa.run_read = run_read;
  return isa;
}

}  // namespace
}  // namespace tandem::kernels::cpu
