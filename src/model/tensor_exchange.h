// Tensor parallelism: ranks that compute the same rows together, each with a share of the attention heads and of the
// dense layers' width (arXiv:1909.08053 §3). What Decoder and MlpLayers need to know of it; src/tp implements it.
//
// Every rank has the whole input of a half layer, multiplies it with its rows of the first matrices and its columns of
// the last one, and so gets a summand of the output. reduce() adds the summands up, each rank a part of the rows;
// share() gives all rows to all ranks. Routed experts lie between the two: a row's experts are asked by the one rank
// that has its sum.
//
// Summands are f32 and are added in the order of the ranks. So a group gives the same bits every time, but not those of
// one rank alone, whose sum has another order.
#pragma once

#include <cstdint>

#include "src/base/result.h"
#include "src/kernels/ops.h"
#include "src/kernels/tensor.h"

namespace tandem::model {

// A rank among those that share the rows.
struct TensorShard {
  int32_t rank = 0;
  int32_t size = 1;
};

struct RowRange {
  int64_t first = 0;
  int64_t count = 0;
};

// The largest step.
struct TensorShape {
  int64_t max_rows = 0;
  int64_t hidden = 0;
  int64_t max_logit_rows = 0;
  int64_t logit_cols = 0;  // columns of logits that each rank computes; 0: rank 0 computes all
};

class TensorExchange {
 public:
  virtual ~TensorExchange() = default;

  virtual const TensorShard& shard() const = 0;
  // What it will take of this rank's memory.
  virtual int64_t extra_bytes(const TensorShape& shape) const = 0;
  // Once, before the first step.
  virtual void prepare(kernels::Ops& ops, kernels::Stream& stream, const TensorShape& shape) = 0;

  // Of a step's rows those that this rank looks after: as many as the others have, or one less.
  RowRange own_rows(int64_t rows) const { return rows_of(shard().rank, rows); }
  RowRange rows_of(int32_t rank, int64_t rows) const {
    const int64_t size = shard().size;
    return {rank * rows / size, (rank + 1) * rows / size - rank * rows / size};
  }

  // All ranks call these in the same order with the same number of rows, at least one. Errors are those of a lost group:
  // kUnavailable, naming the rank. The step is void then.
  // What a rank wrote to memory that it shares with the others before it called reduce(), all see when theirs returns.

  // x, activations [T, H], holds this rank's summands. Afterwards its own rows hold the sums; the others are void.
  virtual Status reduce(const kernels::Tensor& x) = 0;
  // The own rows of x go to all ranks: afterwards x is the same everywhere.
  virtual Status share(const kernels::Tensor& x) = 0;
  Status sum(const kernels::Tensor& x) {
    TANDEM_TRY(reduce(x));
    return share(x);
  }
  // Rank 0 gets the columns that the others have computed: x is f32 [T, logit_cols * size] at rank 0, where its own
  // columns are the first, and [T, logit_cols] at the others.
  virtual Status gather_columns(const kernels::Tensor& x) = 0;
};

}  // namespace tandem::model
