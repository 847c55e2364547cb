// The reference backend's router and experts.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "src/kernels/convert.h"
#include "src/kernels/expert_rows.h"
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

void run_expert(const float* x, const Weight& gate_up, const Weight& down, int64_t expert, float* out) {
  const size_t width = static_cast<size_t>(down.k());
  std::vector<float> hidden(2 * width);
  ref_multiply_row(x, ref_weight(gate_up), expert, hidden.data());
  for (size_t c = 0; c < width; ++c) hidden[c] = ref_silu(hidden[c]) * hidden[c + width];
  ref_multiply_row(hidden.data(), ref_weight(down), expert, out);
}

void encode_row(RowFormat format, const float* x, int64_t k, std::byte* out) {
  const size_t count = static_cast<size_t>(k);
  if (format == RowFormat::kExact) {
    std::memcpy(out, x, count * sizeof(float));
  } else if (format == RowFormat::kBf16) {
    for (size_t i = 0; i < count; ++i) {
      const uint16_t value = bf16_from_float(x[i]);
      std::memcpy(out + i * sizeof(value), &value, sizeof(value));
    }
  } else if (format == RowFormat::kInt8) {
    IntegerActivationRow row;
    encode_activation_row(x, k, kInt8Rows, &row);
    for (size_t i = 0; i < count; ++i) out[i] = static_cast<std::byte>(row.codes[i]);
    std::memcpy(out + row_scale_offset(format, k), row.scales.data(), sizeof(float));
  } else {
    const float scale = quantize_f8e4m3(x, k, reinterpret_cast<uint8_t*>(out));
    std::memcpy(out + row_scale_offset(format, k), &scale, sizeof(scale));
  }
}

void decode_row(RowFormat format, const std::byte* row, int64_t k, float* out) {
  const size_t count = static_cast<size_t>(k);
  if (format == RowFormat::kExact) {
    std::memcpy(out, row, count * sizeof(float));
  } else if (format == RowFormat::kBf16) {
    for (size_t i = 0; i < count; ++i) {
      uint16_t value = 0;
      std::memcpy(&value, row + i * sizeof(value), sizeof(value));
      out[i] = float_from_bf16(value);
    }
  } else if (format == RowFormat::kInt8) {
    decode_int8_row(row, k, out);
  } else {
    float scale = 0.0F;
    std::memcpy(&scale, row + row_scale_offset(format, k), sizeof(scale));
    for (size_t i = 0; i < count; ++i) out[i] = scale * float_from_f8e4m3(static_cast<uint8_t>(row[i]));
  }
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
  for (int64_t expert = 0; expert < gate_up.batch(); ++expert) {
    const int64_t end = element_of<int32_t>(offsets, expert + 1);
    for (int64_t i = element_of<int32_t>(offsets, expert); i < end; ++i) {
      const int64_t slot = element_of<int32_t>(order, i);
      check_index("slot", slot, out.rows);
      run_expert(row_of<float>(x, slot / top_k), gate_up, down, expert, row_of<float>(out, slot));
    }
  }
}

int64_t RefOps::expert_row_bytes(RowFormat format, const WeightFormat& /*weights*/, int64_t k) const {
  if (format != RowFormat::kExact) return rounded_row_bytes(format, k);
  return round_up_row(k * int64_t{sizeof(float)});  // the products round what they take themselves
}

void RefOps::encode_expert_rows(Stream& /*stream*/, const Tensor& x, const WeightFormat& weights,
                                const EncodedRows& out) {
  check_encode_expert_rows(x, out.rows, expert_row_bytes(out.format, weights, x.cols));
  for (int64_t t = 0; t < x.rows; ++t) {
    encode_row(out.format, row_of<float>(x, t), x.cols, row_of<std::byte>(out.rows, t));
  }
}

void RefOps::expert_mlp_encoded(Stream& /*stream*/, const EncodedRows& x, const Tensor& order, const Tensor& offsets,
                                int64_t top_k, const Weight& gate_up, const Weight& down, float* out,
                                const Tensor& targets) {
  const int64_t row_bytes = expert_row_bytes(x.format, gate_up.format(), gate_up.k());
  check_expert_mlp_encoded(x.rows, row_bytes, order, offsets, top_k, gate_up, down, out, targets);
  std::vector<float> row(static_cast<size_t>(gate_up.k()));
  for (int64_t expert = 0; expert < gate_up.batch(); ++expert) {
    const int64_t end = element_of<int32_t>(offsets, expert + 1);
    for (int64_t i = element_of<int32_t>(offsets, expert); i < end; ++i) {
      const int64_t slot = element_of<int32_t>(order, i);
      check_index("slot", slot, x.rows.rows * top_k);
      decode_row(x.format, row_of<std::byte>(x.rows, slot / top_k), gate_up.k(), row.data());
      run_expert(row.data(), gate_up, down, expert, out + element_of<int64_t>(targets, i));
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
