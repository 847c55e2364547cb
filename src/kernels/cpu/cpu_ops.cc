// Operations on single rows, and the plain matrix products.
#include "src/kernels/cpu/cpu_ops.h"

#include <algorithm>

#include "src/kernels/host_matrix.h"
#include "src/kernels/shapes.h"

namespace tandem::kernels::cpu {
namespace {

CpuStream& own(Stream& stream) { return static_cast<CpuStream&>(stream); }

}  // namespace

std::unique_ptr<Weight> CpuOps::pack_weight(std::span<const HostMatrix> matrices, const WeightFormat& format) {
  check_host_matrices(matrices);
  return std::make_unique<PackedWeight>(matrices, format, pool_);
}

void CpuOps::embed(Stream& /*stream*/, const Weight& table, const Tensor& ids, const Tensor& out) {
  check_embed(table, ids, out);
  const PackedWeight& weight = packed_weight(table);
  for_each_row(out.rows, 8 * out.cols, [&](int64_t t) {  // 8: a row's values lie a cache line apart
    const int64_t id = element_of<int32_t>(ids, t);
    check_index("token id", id, weight.n());
    weight.unpack_row(0, id, row_of<float>(out, t));
  });
}

void CpuOps::rms_norm(Stream& /*stream*/, const Tensor& x, const Tensor& weight, float eps, const Tensor& out) {
  check_rms_norm(x, weight, out);
  for_each_row(x.rows, x.cols, [&](int64_t t) {
    for (int64_t first = 0; first < x.cols; first += weight.cols) {
      isa_.rms_norm(row_of<float>(x, t) + first, row_of<float>(weight, 0), weight.cols, eps,
                    row_of<float>(out, t) + first);
    }
  });
}

void CpuOps::add_rms_norm(Stream& /*stream*/, const Tensor& residual, const Tensor& delta, const Tensor& weight,
                          float eps, const Tensor& out) {
  check_same_shape(residual, delta);
  check_rms_norm(residual, weight, out);
  for_each_row(residual.rows, 2 * residual.cols, [&](int64_t t) {
    isa_.add(row_of<float>(residual, t), row_of<float>(delta, t), residual.cols);
    for (int64_t first = 0; first < residual.cols; first += weight.cols) {
      isa_.rms_norm(row_of<float>(residual, t) + first, row_of<float>(weight, 0), weight.cols, eps,
                    row_of<float>(out, t) + first);
    }
  });
}

void CpuOps::add(Stream& /*stream*/, const Tensor& x, const Tensor& y) {
  check_same_shape(x, y);
  for_each_row(x.rows, x.cols, [&](int64_t t) { isa_.add(row_of<float>(x, t), row_of<float>(y, t), x.cols); });
}

void CpuOps::linear(Stream& stream, const Tensor& x, const Weight& weight, const Tensor& out) {
  check_linear(x, weight, out);
  const PackedWeight& packed = packed_weight(weight);
  const GemmInput input = prepare_input(isa_, pool_, packed, x, 1, 0, own(stream).narrow);
  const GemmProduct product{&packed, out};
  multiply_all(isa_, pool_, std::span(&product, 1), input, 0, own(stream).workers);
}

void CpuOps::linears(Stream& stream, const Tensor& x, std::span<const Weight* const> weights,
                     std::span<const Tensor> outs) {
  CHECK_EQ(weights.size(), outs.size());
  std::vector<GemmProduct> products;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_linear(x, *weights[i], outs[i]);
    products.push_back({&packed_weight(*weights[i]), outs[i]});
  }
  // Formats take their rows in different forms; then each weight has its own turn.
  const bool is_alike = std::all_of(weights.begin(), weights.end(),
                                    [&](const Weight* weight) { return weight->format() == weights[0]->format(); });
  if (!is_alike) {
    for (size_t i = 0; i < weights.size(); ++i) linear(stream, x, *weights[i], outs[i]);
    return;
  }
  if (products.empty()) return;
  const GemmInput input = prepare_input(isa_, pool_, *products[0].weight, x, 1, 0, own(stream).narrow);
  multiply_all(isa_, pool_, products, input, 0, own(stream).workers);
}

void CpuOps::head_linear(Stream& stream, const Tensor& x, int64_t x_head_stride, const Weight& weight,
                         const Tensor& out, int64_t out_head_stride) {
  check_head_linear(x, x_head_stride, weight, out, out_head_stride);
  const PackedWeight& packed = packed_weight(weight);
  const GemmInput input = prepare_input(isa_, pool_, packed, x, packed.batch(), x_head_stride, own(stream).narrow);
  const GemmProduct product{&packed, out};
  multiply_all(isa_, pool_, std::span(&product, 1), input, out_head_stride, own(stream).workers);
}

void CpuOps::rope(Stream& /*stream*/, const Tensor& x, int64_t heads, int64_t head_stride, int64_t dim,
                  const Tensor& positions, const Tensor& table, bool interleaved) {
  check_rope(x, heads, head_stride, dim, positions, table);
  const int64_t half = dim / 2;
  for_each_row(x.rows, heads * dim, [&](int64_t t) {
    const int64_t position = element_of<int32_t>(positions, t);
    check_index("rope position", position, table.rows);
    const float* cosine = row_of<float>(table, position);
    for (int64_t h = 0; h < heads; ++h) {
      float* head = row_of<float>(x, t) + h * head_stride;
      if (interleaved) {
        isa_.rotate_pairs(head, cosine, cosine + half, half);
      } else {
        isa_.rotate_halves(head, head + half, cosine, cosine + half, half);
      }
    }
  });
}

void CpuOps::silu_mul(Stream& /*stream*/, const Tensor& gate_up, const Tensor& out) {
  check_silu_mul(gate_up, out);
  for_each_row(out.rows, 4 * out.cols, [&](int64_t t) {
    const float* gate = row_of<float>(gate_up, t);
    isa_.silu_mul(gate, gate + out.cols, out.cols, row_of<float>(out, t));
  });
}

void CpuOps::gather_rows(Stream& /*stream*/, const Tensor& x, const Tensor& indices, const Tensor& out) {
  check_gather_rows(x, indices, out);
  for_each_row(out.rows, out.cols, [&](int64_t i) {
    const int64_t index = element_of<int32_t>(indices, i);
    check_index("row index", index, x.rows);
    std::copy_n(row_of<float>(x, index), x.cols, row_of<float>(out, i));
  });
}

}  // namespace tandem::kernels::cpu
