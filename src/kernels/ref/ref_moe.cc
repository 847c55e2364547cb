// The reference backend's router and experts.
#include <algorithm>
#include <cmath>
#include <vector>

#include "src/kernels/ref/ref_ops.h"
#include "src/kernels/routing.h"
#include "src/kernels/shapes.h"

namespace tandem::kernels {
namespace {

std::vector<float> score_experts(const float* logits, int64_t experts, RouterScoring scoring) {
  std::vector<float> scores(logits, logits + experts);
  if (scoring == RouterScoring::kSigmoid) {
    for (float& score : scores) score = 1.0F / (1.0F + std::exp(-score));
    return scores;
  }
  const float largest = *std::max_element(scores.begin(), scores.end());
  float sum = 0.0F;
  for (float& score : scores) {
    score = std::exp(score - largest);
    sum += score;
  }
  for (float& score : scores) score /= sum;
  return scores;
}

}  // namespace

void RefOps::route(Stream& /*stream*/, const Tensor& logits, const Tensor& bias, const RouterParams& params,
                   const Tensor& ids, const Tensor& weights) {
  check_route(logits, bias, params, ids, weights);
  for (int64_t t = 0; t < logits.rows; ++t) {
    const std::vector<float> scores = score_experts(row_of<float>(logits, t), logits.cols, params.scoring);
    std::vector<float> biased = scores;
    if (bias.address != nullptr) {
      for (size_t e = 0; e < biased.size(); ++e) biased[e] += row_of<float>(bias, 0)[e];
    }
    int32_t* chosen = row_of<int32_t>(ids, t);
    choose_experts(biased.data(), logits.cols, params, chosen);

    float divisor = params.scoring == RouterScoring::kSigmoid ? 1e-20F : 0.0F;
    for (int64_t j = 0; j < params.top_k; ++j) divisor += scores[static_cast<size_t>(chosen[j])];
    if (!params.normalize) divisor = 1.0F;
    for (int64_t j = 0; j < params.top_k; ++j) {
      row_of<float>(weights, t)[j] = scores[static_cast<size_t>(chosen[j])] / divisor * params.scale;
    }
  }
}

void RefOps::sort_by_expert(Stream& /*stream*/, const Tensor& ids, int64_t experts, const Tensor& order,
                            const Tensor& offsets) {
  check_sort_by_expert(ids, experts, order, offsets);
  sort_slots(ids, experts, order, offsets);
}

void RefOps::expert_mlp(Stream& /*stream*/, const Tensor& x, const Tensor& order, const Tensor& offsets, int64_t top_k,
                        const Weight& gate_up, const Weight& down, const Tensor& out) {
  check_expert_mlp(x, order, offsets, top_k, gate_up, down, out);
  const int64_t width = down.k();
  std::vector<float> hidden(static_cast<size_t>(2 * width));
  for (int64_t expert = 0; expert < gate_up.batch(); ++expert) {
    const int64_t end = element_of<int32_t>(offsets, expert + 1);
    for (int64_t i = element_of<int32_t>(offsets, expert); i < end; ++i) {
      const int64_t slot = element_of<int32_t>(order, i);
      check_index("slot", slot, out.rows);
      ref_multiply_row(row_of<float>(x, slot / top_k), ref_weight(gate_up), expert, hidden.data());
      for (size_t c = 0; c < static_cast<size_t>(width); ++c) {
        hidden[c] = ref_silu(hidden[c]) * hidden[c + static_cast<size_t>(width)];
      }
      ref_multiply_row(hidden.data(), ref_weight(down), expert, row_of<float>(out, slot));
    }
  }
}

void RefOps::combine(Stream& /*stream*/, const Tensor& expert_out, const Tensor& weights, const Tensor& out) {
  check_combine(expert_out, weights, out);
  for (int64_t t = 0; t < out.rows; ++t) {
    float* sum = row_of<float>(out, t);
    std::fill_n(sum, out.cols, 0.0F);
    for (int64_t j = 0; j < weights.cols; ++j) {
      const float weight = row_of<float>(weights, t)[j];
      const float* term = row_of<float>(expert_out, t * weights.cols + j);
      for (int64_t i = 0; i < out.cols; ++i) sum[i] += weight * term[i];
    }
  }
}

}  // namespace tandem::kernels
