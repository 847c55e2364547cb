#include "src/model/matrix_part.h"

#include <algorithm>
#include <cstring>

#include "src/base/check.h"
#include "src/kernels/integer.h"
#include "src/model/json_fields.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::HostMatrix;

// Bytes of `count` columns that begin at an even one.
int64_t column_bytes(DType dtype, int64_t count) {
  return dtype == DType::kU4 ? (count + 1) / 2 : count * kernels::dtype_bytes(dtype);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t first = 0;
  int64_t count = 0;
};

Range part_of(int64_t size, const MatrixPart& part) {
  CHECK_EQ(size % part.count, 0);
  return {part.index * (size / part.count), size / part.count};
}

// Columns `columns` of a row-major array of bytes, of the chosen rows.
std::unique_ptr<std::byte[]> copy_columns(const std::byte* from, int64_t row_bytes, const Range& columns,
                                          std::span<const int64_t> rows) {
  std::unique_ptr<std::byte[]> out =
      std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(std::ssize(rows) * columns.count));
  std::byte* to = out.get();
  for (const int64_t row : rows) {
    std::memcpy(to, from + row * row_bytes + columns.first, static_cast<size_t>(columns.count));
    to += columns.count;
  }
  return out;
}

}  // namespace

Status check_part(const std::string& tensor, int64_t n, int64_t k, const kernels::WeightFormat& format,
                  const MatrixPart& part) {
  if (part.is_all()) return {};
  const int64_t size = part.split == Split::kRows ? n : k;
  const int64_t whole_groups = part.split == Split::kRows || !format.is_integer() || format.group_size == 0
                                       || kernels::group_columns(k, format) == k
                                   ? 1
                                   : kernels::group_columns(k, format);
  if (size % part.count == 0 && (size / part.count) % whole_groups == 0) {
    const bool is_odd = format.type == kernels::WeightType::kInt4 && part.split == Split::kColumns &&
                        (size / part.count) % 2 != 0;
    if (!is_odd) return {};
  }
  return invalid_argument("tensor-parallel-size",
                          "--tensor-parallel-size {}: tensor \"{}\" has {} {}, which {} ranks cannot share evenly{}; take "
                          "a smaller size",
                          part.count, printable(tensor), size, part.split == Split::kRows ? "rows" : "columns", part.count,
                          whole_groups > 1 ? " in groups of " + std::to_string(whole_groups) : "");
}

MatrixParts::MatrixParts(std::span<const HostMatrix> whole, int64_t stacked, const MatrixPart& part) {
  if (part.is_all()) {
    matrices_.assign(whole.begin(), whole.end());
    return;
  }
  for (const HostMatrix& matrix : whole) copy(matrix, stacked, part);
}

void MatrixParts::copy(const HostMatrix& whole, int64_t stacked, const MatrixPart& part) {
  CHECK(whole.scales == nullptr || whole.block_n == 1);
  CHECK_EQ(whole.n % stacked, 0);
  const int64_t rows_each = whole.n / stacked;
  const Range rows = part.split == Split::kRows ? part_of(rows_each, part) : Range{0, rows_each};
  const Range columns = part.split == Split::kColumns ? part_of(whole.k, part) : Range{0, whole.k};
  std::vector<int64_t> chosen;
  for (int64_t s = 0; s < stacked; ++s) {
    for (int64_t row = 0; row < rows.count; ++row) chosen.push_back(s * rows_each + rows.first + row);
  }
  const auto keep = [this](std::unique_ptr<std::byte[]> bytes) {
    memory_.push_back(std::move(bytes));
    return memory_.back().get();
  };
  HostMatrix out = whole;
  out.n = std::ssize(chosen);
  out.k = columns.count;
  out.row_stride = 0;
  const int64_t stride = whole.row_stride == 0 ? whole.k : whole.row_stride;
  out.data = keep(copy_columns(whole.data, column_bytes(whole.dtype, stride),
                               {column_bytes(whole.dtype, columns.first), column_bytes(whole.dtype, columns.count)}, chosen));
  if (whole.scales != nullptr) {
    const int64_t groups = ceil_div(whole.k, whole.block_k);
    const Range kept = groups == 1 ? Range{0, 1}
                                   : Range{columns.first / whole.block_k, ceil_div(columns.count, whole.block_k)};
    CHECK(groups == 1 || columns.first % whole.block_k == 0);
    const int64_t bytes = kernels::dtype_bytes(whole.scales_dtype);
    out.block_k = groups == 1 ? columns.count : whole.block_k;
    out.scales = keep(copy_columns(whole.scales, groups * bytes, {kept.first * bytes, kept.count * bytes}, chosen));
    if (whole.zeros != nullptr) out.zeros = keep(copy_columns(whole.zeros, groups, kept, chosen));
  }
  matrices_.push_back(out);
}

}  // namespace tandem::model
