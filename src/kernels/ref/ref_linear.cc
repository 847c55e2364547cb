// The reference backend's weights and matrix products.
#include "src/kernels/convert.h"
#include "src/kernels/host_matrix.h"
#include "src/kernels/ref/ref_ops.h"
#include "src/kernels/shapes.h"

namespace tandem::kernels {

RefWeight::RefWeight(std::span<const HostMatrix> matrices, const WeightFormat& format)
    : batch_(static_cast<int64_t>(matrices.size())), n_(matrices[0].n), k_(matrices[0].k), format_(format) {
  const size_t elements = static_cast<size_t>(batch_ * n_ * k_);
  if (format_ == kF32Weights) {
    f32_.resize(elements);
  } else {
    bf16_.resize(elements);
  }
  for (int64_t b = 0; b < batch_; ++b) {
    for (int64_t n = 0; n < n_; ++n) {
      const HostMatrix& matrix = matrices[static_cast<size_t>(b)];
      const int64_t offset = (b * n_ + n) * k_;
      if (format_ == kF32Weights) {
        decode_row(matrix, n, 0, k_, f32_.data() + offset);
      } else {
        decode_row_bf16(matrix, n, 0, k_, bf16_.data() + offset);
      }
    }
  }
}

int64_t RefWeight::bytes() const {
  return batch_ * n_ * k_ * (format_ == kF32Weights ? int64_t{sizeof(float)} : int64_t{sizeof(uint16_t)});
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
  CHECK(!format.is_integer());
  return std::make_unique<RefWeight>(matrices, format);
}

void ref_multiply_row(const float* x, const RefWeight& weight, int64_t matrix, float* out) {
  for (int64_t n = 0; n < weight.n(); ++n) {
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
