#include "src/model/mla_kv_b.h"

#include <algorithm>
#include <cstring>

namespace tandem::model {
namespace {

using kernels::HostMatrix;

HostMatrix rows_of(const HostMatrix& matrix, int64_t first, int64_t count) {
  HostMatrix part = matrix;
  part.data += first * matrix.k * kernels::dtype_bytes(matrix.dtype);
  part.n = count;
  return part;
}

// Writes the transpose of a dense matrix to `out` and returns its view.
template <typename T>
HostMatrix transpose_to(std::byte* out, const HostMatrix& matrix) {
  const T* source = reinterpret_cast<const T*>(matrix.data);
  T* target = reinterpret_cast<T*>(out);
  for (int64_t i = 0; i < matrix.k; ++i) {
    for (int64_t j = 0; j < matrix.n; ++j) *target++ = source[j * matrix.k + i];
  }
  HostMatrix transposed = matrix;
  transposed.data = out;
  transposed.n = matrix.k;
  transposed.k = matrix.n;
  return transposed;
}

}  // namespace

MlaKvB pack_mla_kv_b(WeightPlan& plan, const HostMatrix& kv_b, const MlaKvBShape& shape) {
  const int64_t head_rows = shape.nope_dim + shape.value_dim;
  const int64_t element_bytes = kernels::dtype_bytes(kv_b.dtype);
  CHECK_EQ(kv_b.n, shape.heads * head_rows);
  CHECK(element_bytes == 2 || element_bytes == 4);
  MlaKvB packed;
  for (int64_t head = 0; head < shape.heads; head += shape.heads_per_group) {
    const int64_t count = std::min(shape.heads_per_group, shape.heads - head);
    packed.expand.push_back(plan.pack({{rows_of(kv_b, head * head_rows, count * head_rows)}}));
  }
  const int64_t head_bytes = shape.nope_dim * kv_b.k * element_bytes;
  const std::unique_ptr<std::byte[]> transposed =
      std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(shape.heads * head_bytes));
  std::vector<HostMatrix> absorb_k;
  std::vector<HostMatrix> absorb_v;
  for (int64_t head = 0; head < shape.heads; ++head) {
    const HostMatrix w_uk = rows_of(kv_b, head * head_rows, shape.nope_dim);
    std::byte* out = transposed.get() + head * head_bytes;
    absorb_k.push_back(element_bytes == 2 ? transpose_to<uint16_t>(out, w_uk) : transpose_to<float>(out, w_uk));
    absorb_v.push_back(rows_of(kv_b, head * head_rows + shape.nope_dim, shape.value_dim));
  }
  packed.absorb_k = plan.pack(absorb_k, true);
  packed.absorb_v = plan.pack(absorb_v);
  return packed;
}

}  // namespace tandem::model
