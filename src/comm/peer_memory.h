// What a peer of this host offers for reading: the memory its payloads lie in, and the tickets that tell which of them
// still count.
#pragma once

#include "src/comm/frame.h"
#include "src/comm/shared_region.h"
#include "src/comm/tickets.h"

namespace tandem::comm {

// Of this start of this machine's kernel; "" if the kernel does not tell.
std::string read_boot_id();
// An offer of a memfd of this process; fd -1 gives an empty offer.
SharedOffer make_offer(int fd, int64_t bytes);

class PeerMemory {
 public:
  // Maps what `greeting` offers. The error says what keeps the two apart: another host, another container, no
  // permission, or nothing offered.
  static Result<PeerMemory> open(const Greeting& greeting, const std::string& boot_id);

  // Where the pieces of a borrowed payload lie; an error if one is outside of what was offered, or all are too long.
  Status find(std::span<const BorrowPiece> pieces, std::vector<ByteSpan>& out) const;
  // Of a slot below kTicketSlots.
  const std::atomic<uint64_t>* ticket_word(uint32_t slot) const { return comm::ticket_word(tickets_.data(), slot); }

 private:
  SharedRegion memory_;
  SharedRegion tickets_;
};

}  // namespace tandem::comm
