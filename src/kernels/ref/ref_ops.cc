// The reference backend's operations on single rows.
#include "src/kernels/ref/ref_ops.h"

#include <algorithm>
#include <cmath>

#include "src/kernels/shapes.h"

namespace tandem::kernels {
namespace {

void norm_row(const float* x, const float* weight, int64_t cols, float eps, float* out) {
  float sum = 0.0F;
  for (int64_t i = 0; i < cols; ++i) sum += x[i] * x[i];
  const float inverse = 1.0F / std::sqrt(sum / static_cast<float>(cols) + eps);
  for (int64_t i = 0; i < cols; ++i) out[i] = x[i] * inverse * weight[i];
}

}  // namespace

void RefOps::embed(Stream& /*stream*/, const Weight& table, const Tensor& ids, const Tensor& out) {
  check_embed(table, ids, out);
  const RefWeight& weight = ref_weight(table);
  for (int64_t t = 0; t < out.rows; ++t) {
    const int64_t id = element_of<int32_t>(ids, t);
    check_index("token id", id, table.n());
    float* row = row_of<float>(out, t);
    for (int64_t i = 0; i < out.cols; ++i) row[i] = weight.at(0, id, i);
  }
}

void RefOps::rms_norm(Stream& /*stream*/, const Tensor& x, const Tensor& weight, float eps, const Tensor& out) {
  check_rms_norm(x, weight, out);
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t first = 0; first < x.cols; first += weight.cols) {
      norm_row(row_of<float>(x, t) + first, row_of<float>(weight, 0), weight.cols, eps, row_of<float>(out, t) + first);
    }
  }
}

void RefOps::add_rms_norm(Stream& stream, const Tensor& residual, const Tensor& delta, const Tensor& weight, float eps,
                          const Tensor& out) {
  add(stream, residual, delta);
  rms_norm(stream, residual, weight, eps, out);
}

void RefOps::add(Stream& /*stream*/, const Tensor& x, const Tensor& y) {
  check_same_shape(x, y);
  for (int64_t t = 0; t < x.rows; ++t) {
    float* sum = row_of<float>(x, t);
    const float* term = row_of<float>(y, t);
    for (int64_t i = 0; i < x.cols; ++i) sum[i] += term[i];
  }
}

void RefOps::rope(Stream& /*stream*/, const Tensor& x, int64_t heads, int64_t head_stride, int64_t dim,
                  const Tensor& positions, const Tensor& table, bool interleaved) {
  check_rope(x, heads, head_stride, dim, positions, table);
  const int64_t half = dim / 2;
  for (int64_t t = 0; t < x.rows; ++t) {
    const int64_t position = element_of<int32_t>(positions, t);
    check_index("rope position", position, table.rows);
    const float* cosine = row_of<float>(table, position);
    const float* sine = cosine + half;
    for (int64_t h = 0; h < heads; ++h) {
      float* head = row_of<float>(x, t) + h * head_stride;
      for (int64_t i = 0; i < half; ++i) {
        float& a = interleaved ? head[2 * i] : head[i];
        float& b = interleaved ? head[2 * i + 1] : head[i + half];
        const float rotated_a = a * cosine[i] - b * sine[i];
        const float rotated_b = b * cosine[i] + a * sine[i];
        a = rotated_a;
        b = rotated_b;
      }
    }
  }
}

float ref_silu(float x) { return x / (1.0F + std::exp(-x)); }

void RefOps::silu_mul(Stream& /*stream*/, const Tensor& gate_up, const Tensor& out) {
  check_silu_mul(gate_up, out);
  for (int64_t t = 0; t < out.rows; ++t) {
    const float* gate = row_of<float>(gate_up, t);
    const float* up = gate + out.cols;
    float* row = row_of<float>(out, t);
    for (int64_t i = 0; i < out.cols; ++i) row[i] = ref_silu(gate[i]) * up[i];
  }
}

void RefOps::gather_rows(Stream& /*stream*/, const Tensor& x, const Tensor& indices, const Tensor& out) {
  check_gather_rows(x, indices, out);
  for (int64_t i = 0; i < out.rows; ++i) {
    const int64_t index = element_of<int32_t>(indices, i);
    check_index("row index", index, x.rows);
    std::copy_n(row_of<float>(x, index), x.cols, row_of<float>(out, i));
  }
}

}  // namespace tandem::kernels
