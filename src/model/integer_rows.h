// Rows of integer weights as they lie in a HostMatrix of kI8 or kU4, and how rows of floats become such rows.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "src/kernels/ops.h"

namespace tandem::model {

// Some rows in memory that belongs to somebody else. A row has `code_bytes` bytes of codes (kI8: k, kU4: k / 2 rounded
// up, the last high nibble 0) and `groups` scales and zeros.
struct IntegerRows {
  std::byte* codes = nullptr;
  int64_t code_bytes = 0;
  float* scales = nullptr;
  std::byte* zeros = nullptr;  // null: kI8, or 8 everywhere
  int64_t groups = 0;

  IntegerRows from(int64_t row) const {
    return {codes + row * code_bytes, code_bytes, scales + row * groups,
            zeros == nullptr ? nullptr : zeros + row * groups, groups};
  }
};

// Bytes of the codes of a row of k columns.
int64_t code_bytes_of(int64_t k, kernels::WeightType type);

// Memory for some rows; keeps its size when it shrinks, so that one serves a whole load.
class IntegerBuffer {
 public:
  // Forgets what it held. The zeros are there only if asked for.
  void resize(int64_t rows, int64_t k, const kernels::WeightFormat& format, bool has_zeros);
  const IntegerRows& rows() const { return rows_; }
  // `rows_per_matrix` rows at a time as matrices for pack_weight.
  std::vector<kernels::HostMatrix> matrices(int64_t rows_per_matrix) const;

 private:
  int64_t num_rows_ = 0;
  int64_t k_ = 0;
  kernels::WeightFormat format_;
  IntegerRows rows_;
  std::unique_ptr<std::byte[]> memory_;
  int64_t capacity_ = 0;
};

// Quantises `count` rows of k values: the bits of kernels::encode_weight_row, in loops that a compiler makes vectors
// of. False if a value is not finite.
bool quantise_rows(const float* values, int64_t count, int64_t k, const kernels::WeightFormat& format,
                   const IntegerRows& out);

void floats_from_bf16(const uint16_t* values, int64_t count, float* out);

}  // namespace tandem::model
