// Bulk data between ranks, in pieces that ride along with the rounds of a group: before a round each rank puts one chunk
// for every rank that it has something for, after it everybody takes what has come. So steps go on meanwhile, each a
// little longer, no thread or lock is needed, and all ranks know without a message when the last chunk is through.
//
// A chunk of round n is there when round n is: it was put before its sender entered the round. Two places per sender, used
// in turn, suffice: the chunk of round n + 2 is put after the sender has left round n + 1, which the receiver entered
// after taking that of round n.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "src/group/fabric.h"

namespace tandem::ep {

struct BulkTransfer {
  int32_t source = 0;
  int32_t target = 0;  // may be the source
  int64_t bytes = 0;
};

class ChunkChannel {
 public:
  // Reads [offset, offset + out.size()) of transfer `index`, on its source.
  using Fill = std::function<void(size_t index, int64_t offset, std::span<std::byte> out)>;
  // Takes them on its target.
  using Take = std::function<void(size_t index, int64_t offset, std::span<const std::byte> in)>;

  ChunkChannel(int64_t window_offset, int64_t chunk_bytes) : window_offset_(window_offset), chunk_bytes_(chunk_bytes) {}
  // Bytes of every window from window_offset on.
  static int64_t window_bytes(int32_t size, int64_t chunk_bytes) { return int64_t{size} * 2 * chunk_bytes; }

  // Transfers of one pair go one after the other, pairs at the same time. The same list on all ranks. Nothing may be
  // under way.
  void start(int32_t size, std::vector<BulkTransfer> transfers);
  bool is_busy() const { return rounds_left_ > 0; }
  // Before and after the same round. receive() is true when it was the last one.
  Status send(group::Fabric& fabric, const Fill& fill);
  bool receive(group::Fabric& fabric, const Take& take);
  // Sent and taken by this rank with the last round.
  int64_t carried_bytes() const { return carried_bytes_; }
  // Forgets what is under way and what has been: in a new epoch, where some ranks have a past and some have none.
  void stop();

 private:
  // Where a pair is in its list.
  struct Cursor {
    std::vector<size_t> transfers;
    size_t at = 0;
    int64_t offset = 0;
  };
  struct Piece {
    size_t index = 0;
    int64_t offset = 0;
    int64_t bytes = 0;  // 0: the pair is done
  };
  Piece next_piece(Cursor& cursor) const;
  Cursor& cursor(int32_t source, int32_t target) { return cursors_[static_cast<size_t>(source * size_ + target)]; }
  int64_t place(int32_t source) const;

  const int64_t window_offset_;
  const int64_t chunk_bytes_;
  int32_t size_ = 0;
  std::vector<BulkTransfer> transfers_;
  std::vector<Cursor> cursors_;  // [source, target]; of this rank's pairs those of its own row and column are used
  int64_t rounds_left_ = 0;
  uint64_t round_ = 0;
  int64_t carried_bytes_ = 0;
  Piece own_piece_;  // that this rank has put for itself
};

}  // namespace tandem::ep
