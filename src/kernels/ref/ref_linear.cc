// The reference backend's weights and matrix products.
#include <algorithm>
#include <cmath>

#include "src/kernels/convert.h"
#include "src/kernels/host_matrix.h"
#include "src/kernels/ref/ref_ops.h"
#include "src/kernels/shapes.h"

namespace tandem::kernels {

RefWeight::RefWeight(std::span<const HostMatrix> matrices, const WeightFormat& format)
    : batch_(static_cast<int64_t>(matrices.size())), n_(matrices[0].n), k_(matrices[0].k), format_(format) {
  const size_t rows = static_cast<size_t>(batch_ * n_);
  const size_t elements = rows * static_cast<size_t>(k_);
  if (format_ == kF32Weights) f32_.resize(elements);
  if (format_.type == WeightType::kBf16) bf16_.resize(elements);
  if (format_.is_integer()) integers_.resize(rows);
  for (int64_t row = 0; row < batch_ * n_; ++row) {
    const HostMatrix& matrix = matrices[static_cast<size_t>(row / n_)];
    if (format_ == kF32Weights) decode_row(matrix, row % n_, 0, k_, f32_.data() + row * k_);
    if (format_.type == WeightType::kBf16) decode_row_bf16(matrix, row % n_, 0, k_, bf16_.data() + row * k_);
    if (format_.is_integer()) encode_weight_row(matrix, row % n_, format_, &integers_[static_cast<size_t>(row)]);
  }
}

int64_t RefWeight::bytes() const {
  if (!format_.is_integer()) {
    return batch_ * n_ * k_ * (format_ == kF32Weights ? int64_t{sizeof(float)} : int64_t{sizeof(uint16_t)});
  }
  return batch_ * n_ * (k_ + count_groups(k_, format_) * int64_t{sizeof(float) + 1});
}

float RefWeight::at(int64_t matrix, int64_t n, int64_t k) const {
  const size_t index = static_cast<size_t>((matrix * n_ + n) * k_ + k);
  return format_ == kF32Weights ? f32_[index] : float_from_bf16(bf16_[index]);
}

const RefWeight& ref_weight(const Weight& weight) {
  const RefWeight* mine = dynamic_cast<const RefWeight*>(&weight);
  CHECK(mine != nullptr);  // a weight belongs to the backend that packed it
  return *mine;
}

std::unique_ptr<Weight> RefOps::pack_weight(std::span<const HostMatrix> matrices, const WeightFormat& format) {
  check_host_matrices(matrices);
  if (format.is_integer()) CHECK_LE(group_columns(matrices[0].k, format), kMaxGroupColumns);
  return std::make_unique<RefWeight>(matrices, format);
}

namespace {

// One output of an integer product: groups in ascending order, each exact until its sum becomes an f32.
float multiply_integers(const IntegerActivationRow& x, const IntegerWeightRow& w, const WeightFormat& format) {
  const int64_t k = std::ssize(x.codes);
  const int64_t columns = group_columns(k, format);
  float sum = 0.0F;
  for (int64_t g = 0; g < std::ssize(x.scales); ++g) {
    const size_t group = static_cast<size_t>(g);
    int32_t high = 0;
    int32_t low = 0;
    for (int64_t i = g * columns; i < std::min(k, (g + 1) * columns); ++i) {
      const size_t at = static_cast<size_t>(i);
      const int32_t weight = int32_t{w.codes[at]} - int32_t{w.zeros[group]};
      high += high_part(x.codes[at]) * weight;
      low += low_part(x.codes[at]) * weight;
    }
    const float value = format.activation_bits == 8
                            ? static_cast<float>(low)
                            : std::fma(256.0F, static_cast<float>(high), static_cast<float>(low));
    sum = std::fma(value, x.scales[group] * w.scales[group], sum);
  }
  return sum;
}

}  // namespace

void ref_multiply_row(const float* x, const RefWeight& weight, int64_t matrix, float* out) {
  IntegerActivationRow codes;
  if (weight.format().is_integer()) encode_activation_row(x, weight.k(), weight.format(), &codes);
  for (int64_t n = 0; n < weight.n(); ++n) {
    if (weight.format().is_integer()) {
      out[n] = multiply_integers(codes, weight.integer_row(matrix, n), weight.format());
      continue;
    }
    float sum = 0.0F;
    for (int64_t k = 0; k < weight.k(); ++k) sum += x[k] * weight.at(matrix, n, k);
    out[n] = sum;
  }
}

void RefOps::linear(Stream& /*stream*/, const Tensor& x, const Weight& weight, const Tensor& out) {
  check_linear(x, weight, out);
  for (int64_t t = 0; t < x.rows; ++t) {
    ref_multiply_row(row_of<float>(x, t), ref_weight(weight), 0, row_of<float>(out, t));
  }
}

void RefOps::linears(Stream& stream, const Tensor& x, std::span<const Weight* const> weights,
                     std::span<const Tensor> outs) {
  CHECK_EQ(weights.size(), outs.size());
  for (size_t i = 0; i < weights.size(); ++i) linear(stream, x, *weights[i], outs[i]);
}

void RefOps::head_linear(Stream& /*stream*/, const Tensor& x, int64_t x_head_stride, const Weight& weight,
                         const Tensor& out, int64_t out_head_stride) {
  check_head_linear(x, x_head_stride, weight, out, out_head_stride);
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t h = 0; h < weight.batch(); ++h) {
      ref_multiply_row(row_of<float>(x, t) + h * x_head_stride, ref_weight(weight), h,
                       row_of<float>(out, t) + h * out_head_stride);
    }
  }
}

}  // namespace tandem::kernels
