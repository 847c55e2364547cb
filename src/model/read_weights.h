// Reads matrices of a WeightSource into memory of our own, in parallel and in pieces that fit in the cache. Pages of
// the source are given back as soon as a window of matrices is done, so that no more of it is resident than that.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "src/model/weights.h"

namespace tandem::model {

// All refs have the same n and k.

// Fills `buffer` with the matrices as `format`: code by code where they are stored so, else quantised. False if a value
// to quantise is not finite.
bool read_integers(const WeightSource& source, std::span<const MatrixRef> refs, const kernels::WeightFormat& format,
                   int threads, IntegerBuffer* buffer);

// The matrices as dense arrays of kBf16 or kF32, `parts` consecutive refs on top of each other.
struct DenseMatrices {
  std::unique_ptr<std::byte[]> bytes;
  std::vector<kernels::HostMatrix> matrices;
};
DenseMatrices read_dense(const WeightSource& source, std::span<const MatrixRef> refs, int64_t parts,
                         kernels::DType dtype, int threads);

}  // namespace tandem::model
