// The part of a weight that one tensor rank keeps: some of its rows, or some of its columns.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/kernels/ops.h"

namespace tandem::model {

enum class Split : uint8_t { kNone, kRows, kColumns };

struct MatrixPart {
  Split split = Split::kNone;
  int32_t index = 0;
  int32_t count = 1;

  bool is_all() const { return split == Split::kNone || count == 1; }
  // Of a number of elements or bytes of the whole.
  int64_t share_of(int64_t whole) const { return is_all() ? whole : whole / count; }
};

// Whether a matrix [n, k] that will have `format` can be cut so; `tensor` is its name.
Status check_part(const std::string& tensor, int64_t n, int64_t k, const kernels::WeightFormat& format,
                  const MatrixPart& part);

// Parts of matrices, copied out of them.
class MatrixParts {
 public:
  // Each matrix consists of `stacked` matrices on top of each other, each of which is cut by itself. Scales, if there
  // are any, belong to single rows. The result is as exact as `whole`: codes and scales are those of the whole matrix.
  MatrixParts(std::span<const kernels::HostMatrix> whole, int64_t stacked, const MatrixPart& part);
  std::span<const kernels::HostMatrix> matrices() const { return matrices_; }

 private:
  void copy(const kernels::HostMatrix& whole, int64_t stacked, const MatrixPart& part);

  std::vector<std::unique_ptr<std::byte[]>> memory_;
  std::vector<kernels::HostMatrix> matrices_;
};

}  // namespace tandem::model
