// Sums and rows of tensor parallelism over the windows of a fabric: model::TensorExchange.
//
// A step's rows are cut into one part per rank. For reduce() every rank writes its summands of a part into the window of
// the rank that looks after it, which adds them up; for share() that rank writes the sums into every window. Many rows
// are moved in pieces, so that windows stay small.
//
// Places are used in turns, even and odd. A rank writes to a place again only two pieces later, and it can begin a piece
// only after it has heard from all others that they have begun the one before, hence ended the one before that.
#pragma once

#include <cstdint>
#include <vector>

#include "src/group/fabric.h"
#include "src/model/tensor_exchange.h"

namespace tandem::tp {

struct TensorOptions {
  model::TensorShard shard;
  group::RankId first;        // tensor rank t is rank first + t of the group
  int64_t window_offset = 0;  // where this class's part of the windows begins; a multiple of 64
};

class TensorWindows final : public model::TensorExchange, public group::FabricUser {
 public:
  explicit TensorWindows(const TensorOptions& options) : options_(options) {}

  // Bytes of every window from window_offset on; after prepare().
  int64_t window_bytes() const { return plan_.bytes; }
  // Between window_bytes() and attach(): where that part is.
  void set_window_offset(int64_t offset) { options_.window_offset = offset; }

  // Between steps and after prepare().
  void attach(group::Fabric& fabric) override;
  void detach() override { fabric_ = nullptr; }

  const model::TensorShard& shard() const override { return options_.shard; }
  int64_t extra_bytes(const model::TensorShape& shape) const override;
  void prepare(kernels::Ops& ops, kernels::Stream& stream, const model::TensorShape& shape) override;
  Status reduce(const kernels::Tensor& x) override;
  Status share(const kernels::Tensor& x) override;
  Status gather_columns(const kernels::Tensor& x) override;

 private:
  // Offsets from the begin of this class's part of a window.
  struct Plan {
    int64_t piece_rows = 0;  // of each rank
    int64_t row_bytes = 0;
    int64_t summands = 0;  // [2][ranks][piece_rows] rows: of this rank's part, by who has computed them
    int64_t sums = 0;      // [2][ranks][piece_rows] rows: by who looks after them
    int64_t logits = 0;    // rank 0: [ranks][max_logit_rows, logit_cols]
    int64_t bytes = 0;
  };
  static Plan plan_window(const model::TensorShape& shape, int32_t ranks);

  group::RankId peer(int32_t rank) const { return group::RankId(options_.first.value + rank); }
  int64_t summand_place(uint64_t piece, int32_t from) const;
  int64_t sum_place(uint64_t piece, int32_t of) const;
  int64_t logit_place(int32_t from) const;
  // The rows of x that `rank` looks after, of the piece that begins at row `first` of each rank's.
  kernels::Tensor piece_of(const kernels::Tensor& x, int32_t rank, int64_t first) const;
  int64_t most_rows(int64_t rows) const;
  void send(int32_t to, int64_t place, const kernels::Tensor& rows);
  kernels::Tensor view(int64_t place, const kernels::Tensor& like) const;
  void copy_from(int64_t place, const kernels::Tensor& to);
  // Tells the others that this rank's part of a piece is theirs, and waits for theirs.
  Status meet(group::Channel channel, uint64_t count);
  void add_summands(uint64_t piece, const kernels::Tensor& own);

  TensorOptions options_;
  model::TensorShape shape_;
  Plan plan_;
  kernels::Ops* ops_ = nullptr;
  kernels::Stream* stream_ = nullptr;
  group::Fabric* fabric_ = nullptr;
  uint64_t reduced_ = 0;  // pieces of this epoch
  uint64_t shared_ = 0;
  uint64_t gathered_ = 0;
};

}  // namespace tandem::tp
