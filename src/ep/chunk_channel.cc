#include "src/ep/chunk_channel.h"

#include <algorithm>

#include "src/base/check.h"

namespace tandem::ep {

using group::RankId;

void ChunkChannel::start(int32_t size, std::vector<BulkTransfer> transfers) {
  CHECK(!is_busy());
  size_ = size;
  transfers_ = std::move(transfers);
  cursors_.assign(static_cast<size_t>(size) * static_cast<size_t>(size), {});
  std::vector<int64_t> rounds(cursors_.size());
  for (size_t i = 0; i < transfers_.size(); ++i) {
    const BulkTransfer& transfer = transfers_[i];
    CHECK_GE(transfer.bytes, 1);
    const size_t pair = static_cast<size_t>(transfer.source * size + transfer.target);
    cursors_[pair].transfers.push_back(i);
    rounds[pair] += (transfer.bytes + chunk_bytes_ - 1) / chunk_bytes_;
  }
  rounds_left_ = *std::max_element(rounds.begin(), rounds.end());
}

void ChunkChannel::stop() {
  rounds_left_ = 0;
  round_ = 0;
  own_piece_ = {};
}

ChunkChannel::Piece ChunkChannel::next_piece(Cursor& cursor) const {
  if (cursor.at == cursor.transfers.size()) return {};
  Piece piece;
  piece.index = cursor.transfers[cursor.at];
  piece.offset = cursor.offset;
  const int64_t total = transfers_[piece.index].bytes;
  piece.bytes = std::min(chunk_bytes_, total - piece.offset);
  cursor.offset += piece.bytes;
  if (cursor.offset == total) {
    ++cursor.at;
    cursor.offset = 0;
  }
  return piece;
}

int64_t ChunkChannel::place(int32_t source) const {
  return window_offset_ + (int64_t{source} * 2 + static_cast<int64_t>(round_ % 2)) * chunk_bytes_;
}

Status ChunkChannel::send(group::Fabric& fabric, const Fill& fill) {
  carried_bytes_ = 0;
  if (!is_busy()) return {};
  const int32_t own = fabric.rank().value;
  std::vector<std::byte> staged;  // of ranks whose windows are not mapped: must stay until flush()
  for (int32_t i = 0; i < size_; ++i) {
    const int32_t target = (own + i) % size_;
    const Piece piece = next_piece(cursor(own, target));
    if (target == own) own_piece_ = piece;
    if (piece.bytes == 0) continue;
    carried_bytes_ += piece.bytes;
    if (std::byte* const window = fabric.direct(RankId(target)); window != nullptr) {
      fill(piece.index, piece.offset, {window + place(own), static_cast<size_t>(piece.bytes)});
      continue;
    }
    staged.resize(static_cast<size_t>(piece.bytes));
    fill(piece.index, piece.offset, staged);
    fabric.put(RankId(target), place(own), staged);
    TANDEM_TRY(fabric.flush());
  }
  return {};
}

bool ChunkChannel::receive(group::Fabric& fabric, const Take& take) {
  if (!is_busy()) return false;
  const int32_t own = fabric.rank().value;
  for (int32_t source = 0; source < size_; ++source) {
    // A rank's own pair has advanced in send() already: what it took there is what has come.
    Cursor& pair = cursor(source, own);
    const Piece piece = source == own ? own_piece_ : next_piece(pair);
    if (piece.bytes == 0) continue;
    carried_bytes_ += piece.bytes;
    take(piece.index, piece.offset, fabric.window().subspan(static_cast<size_t>(place(source)),
                                                            static_cast<size_t>(piece.bytes)));
  }
  own_piece_ = {};
  ++round_;
  return --rounds_left_ == 0;
}

}  // namespace tandem::ep
