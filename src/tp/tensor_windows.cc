#include "src/tp/tensor_windows.h"

#include <algorithm>

#include "src/base/check.h"

namespace tandem::tp {

using group::Channel;
using kernels::DType;
using kernels::Tensor;

namespace {

// Rows of all ranks that one piece has at most: enough that a piece costs far more than its two meetings.
constexpr int64_t kPieceRows = 512;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

TensorWindows::Plan TensorWindows::plan_window(const model::TensorShape& shape, int32_t ranks) {
  Plan plan;
  plan.piece_rows = (std::min(shape.max_rows, kPieceRows) + ranks - 1) / ranks;
  plan.row_bytes = shape.hidden * int64_t{sizeof(float)};
  const int64_t place_bytes = aligned(plan.piece_rows * plan.row_bytes);
  plan.sums = 2 * ranks * place_bytes;
  plan.logits = 2 * plan.sums;
  plan.bytes = plan.logits + ranks * aligned(shape.max_logit_rows * shape.logit_cols * int64_t{sizeof(float)});
  return plan;
}

int64_t TensorWindows::extra_bytes(const model::TensorShape& shape) const {
  return plan_window(shape, options_.shard.size).bytes;
}

void TensorWindows::prepare(kernels::Ops& ops, kernels::Stream& stream, const model::TensorShape& shape) {
  CHECK(ops.activation_dtype() == DType::kF32);
  ops_ = &ops;
  stream_ = &stream;
  shape_ = shape;
  plan_ = plan_window(shape, options_.shard.size);
}

void TensorWindows::attach(group::Fabric& fabric) {
  CHECK_EQ(fabric.rank().value, options_.first.value + options_.shard.rank);
  CHECK_LE(options_.first.value + options_.shard.size, fabric.size());
  CHECK_EQ(options_.window_offset % 64, 0);
  CHECK_GE(std::ssize(fabric.window()), options_.window_offset + plan_.bytes);
  fabric_ = &fabric;
  reduced_ = shared_ = gathered_ = 0;
}

int64_t TensorWindows::summand_place(uint64_t piece, int32_t from) const {
  const int64_t index = static_cast<int64_t>(piece % 2) * options_.shard.size + from;
  return options_.window_offset + plan_.summands + index * aligned(plan_.piece_rows * plan_.row_bytes);
}

int64_t TensorWindows::sum_place(uint64_t piece, int32_t of) const {
  return summand_place(piece, of) + plan_.sums - plan_.summands;
}

int64_t TensorWindows::logit_place(int32_t from) const {
  const int64_t bytes = shape_.max_logit_rows * shape_.logit_cols * int64_t{sizeof(float)};
  return options_.window_offset + plan_.logits + from * aligned(bytes);
}

Tensor TensorWindows::piece_of(const Tensor& x, int32_t rank, int64_t first) const {
  const model::RowRange part = rows_of(rank, x.rows);
  const int64_t count = std::clamp<int64_t>(part.count - first, 0, plan_.piece_rows);
  return x.row_slice(part.first + std::min(first, part.count), count);
}

int64_t TensorWindows::most_rows(int64_t rows) const {
  return (rows + options_.shard.size - 1) / options_.shard.size;
}

void TensorWindows::send(int32_t to, int64_t place, const Tensor& rows) {
  if (rows.rows == 0) return;
  CHECK_EQ(rows.stride, rows.cols);
  fabric_->put(peer(to), place, std::span(rows.address, static_cast<size_t>(rows.bytes())));
}

// Rows that lie densely at `place` of this rank's window.
Tensor TensorWindows::view(int64_t place, const Tensor& like) const {
  return {fabric_->window().data() + place, like.dtype, like.rows, like.cols, like.cols};
}

void TensorWindows::copy_from(int64_t place, const Tensor& to) {
  if (to.rows == 0) return;
  CHECK_EQ(to.stride, to.cols);
  ops_->upload(*stream_, to.address, fabric_->window().subspan(static_cast<size_t>(place), static_cast<size_t>(to.bytes())));
}

Status TensorWindows::meet(Channel channel, uint64_t count) {
  TANDEM_TRY(fabric_->flush());
  for (int32_t r = 0; r < options_.shard.size; ++r) {
    if (r != options_.shard.rank) fabric_->signal(peer(r), channel, count);
  }
  for (int32_t r = 0; r < options_.shard.size; ++r) {
    if (r != options_.shard.rank) TANDEM_TRY(fabric_->wait(peer(r), channel, count));
  }
  return {};
}

Status TensorWindows::reduce(const Tensor& x) {
  CHECK(fabric_ != nullptr && x.rows <= shape_.max_rows && x.cols == shape_.hidden);
  ops_->synchronize(*stream_);
  for (int64_t first = 0; first < most_rows(x.rows); first += plan_.piece_rows) {
    const uint64_t piece = ++reduced_;
    for (int32_t r = 0; r < options_.shard.size; ++r) {
      if (r != options_.shard.rank) send(r, summand_place(piece, options_.shard.rank), piece_of(x, r, first));
    }
    TANDEM_TRY(meet(Channel::kReduce, piece));
    const Tensor own = piece_of(x, options_.shard.rank, first);
    if (own.rows > 0) add_summands(piece, own);
    ops_->synchronize(*stream_);  // a place may be written again once this rank begins the next piece but one
  }
  return {};
}

// In the order of the ranks. Two summands have no order, so the first two ranks can add the others' to their own.
void TensorWindows::add_summands(uint64_t piece, const Tensor& own) {
  const int32_t rank = options_.shard.rank;
  if (rank > 1) {
    const Tensor kept = view(summand_place(piece, rank), own);
    ops_->read_back(*stream_, own.address, std::span(kept.address, static_cast<size_t>(kept.bytes())));
    copy_from(summand_place(piece, 0), own);
  }
  for (int32_t r = rank > 1 ? 1 : 0; r < options_.shard.size; ++r) {
    if (rank <= 1 && r == rank) continue;
    ops_->add(*stream_, own, view(summand_place(piece, r), own));
  }
}

Status TensorWindows::share(const Tensor& x) {
  CHECK(fabric_ != nullptr && x.rows <= shape_.max_rows && x.cols == shape_.hidden);
  ops_->synchronize(*stream_);
  for (int64_t first = 0; first < most_rows(x.rows); first += plan_.piece_rows) {
    const uint64_t piece = ++shared_;
    const Tensor own = piece_of(x, options_.shard.rank, first);
    for (int32_t r = 0; r < options_.shard.size; ++r) {
      if (r != options_.shard.rank) send(r, sum_place(piece, options_.shard.rank), own);
    }
    TANDEM_TRY(meet(Channel::kShare, piece));
    for (int32_t r = 0; r < options_.shard.size; ++r) {
      if (r != options_.shard.rank) copy_from(sum_place(piece, r), piece_of(x, r, first));
    }
    ops_->synchronize(*stream_);
  }
  return {};
}

// Of a step; before the next one all ranks meet in its first layer, so a place is read before it is written again.
Status TensorWindows::gather_columns(const Tensor& x) {
  CHECK(fabric_ != nullptr && x.rows <= shape_.max_logit_rows && shape_.logit_cols > 0);
  ops_->synchronize(*stream_);
  const uint64_t count = ++gathered_;
  if (options_.shard.rank != 0) {
    send(0, logit_place(options_.shard.rank), x);
    TANDEM_TRY(fabric_->flush());
    fabric_->signal(peer(0), Channel::kLogits, count);
    return {};
  }
  for (int32_t r = 1; r < options_.shard.size; ++r) {
    TANDEM_TRY(fabric_->wait(peer(r), Channel::kLogits, count));
    for (int64_t row = 0; row < x.rows; ++row) {
      const int64_t row_bytes = shape_.logit_cols * int64_t{sizeof(float)};
      const Tensor to = x.row_slice(row, 1).col_slice(r * shape_.logit_cols, shape_.logit_cols);
      ops_->upload(*stream_, to.address,
                   fabric_->window().subspan(static_cast<size_t>(logit_place(r) + row * row_bytes),
                                             static_cast<size_t>(row_bytes)));
    }
  }
  ops_->synchronize(*stream_);
  return {};
}

}  // namespace tandem::tp
