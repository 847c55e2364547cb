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
  isa.gemm_bf16_wide_input = gemm_bf16_wide_input;
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
#ifdef TANDEM_DOT_PAIRS
  isa.dot_pairs = true;
  isa.score_pairs = score_pairs;
  isa.accumulate_pairs = accumulate_pairs;
  isa.round_pairs = round_pairs;
  isa.interleave = interleave;
#endif
  isa.fold = fold;
  isa.finish = finish;
  isa.transpose = transpose;
  isa.split_pairs_bf16 = split_pairs_bf16;
  isa.split_pairs_f8 = split_pairs_f8;
  isa.from_f8 = from_f8;
  isa.f8_to_bf16 = f8_to_bf16;
  isa.quantize_f8 = quantize_f8;
  isa.run_fma = run_fma;
  isa.fma_flops_per_round = kFmaFlopsPerRound;
  isa.run_dot = run_dot;
  isa.dot_ops_per_round = kDotOpsPerRound;
  isa.run_read = run_read;
  return isa;
}

}  // namespace
}  // namespace tandem::kernels::cpu
