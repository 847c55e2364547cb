// Reads a weight as it stands in a checkpoint (any alignment, any of the dtypes that checkpoints use).
#pragma once

#include <cstdint>
#include <span>

#include "src/kernels/ops.h"

namespace tandem::kernels {

// CHECKs that every matrix is readable and that all have the same n and k.
void check_host_matrices(std::span<const HostMatrix> matrices);

// Columns [first, first + count) of row n as f32. Blocks of fp8 come out multiplied by their scale, in f32.
void decode_row(const HostMatrix& matrix, int64_t n, int64_t first, int64_t count, float* out);

// The same, rounded to bf16; a bf16 source is copied bit by bit.
void decode_row_bf16(const HostMatrix& matrix, int64_t n, int64_t first, int64_t count, uint16_t* out);

// The k codes of row n of a kI8 or kU4 matrix, unsigned: 8 bits count from 128.
void load_codes(const HostMatrix& matrix, int64_t n, uint8_t* out);

// Element `index` of matrix.scales.
float load_scale(const HostMatrix& matrix, int64_t index);

}  // namespace tandem::kernels
