// Tickets tell the borrower of a payload whether its owner still lends it: one word for each lent payload, in memory
// that the owner writes and its peers map for reading.
//
// The owner takes a payload back by changing the word and only then overwrites the bytes; the borrower copies the bytes
// and only then reads the word (a sequence lock whose writer never waits). So the owner waits for nobody, not even for a
// borrower that was stopped in the middle of its copy.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "src/comm/shared_region.h"

namespace tandem::comm {

inline constexpr int64_t kTicketSlots = 4096;     // payloads lent at a time, to all peers together
inline constexpr int64_t kTicketSlotBytes = 64;  // a cache line each
inline constexpr int64_t kTicketBytes = kTicketSlots * kTicketSlotBytes;
static_assert(std::atomic<uint64_t>::is_always_lock_free);

struct Ticket {
  uint32_t slot = 0;
  uint64_t value = 0;  // never used twice by an owner; never 0
};

class TicketTable {
 public:
  static Result<TicketTable> create();

  // Nothing if all slots are taken.
  std::optional<Ticket> take();
  // After it returns, who reads the word of this ticket finds another value. Once per ticket.
  void end(const Ticket& ticket);
  RegionAddress address() const { return region_.address(); }
  int64_t num_taken() const { return kTicketSlots - static_cast<int64_t>(free_.size()); }

 private:
  SharedRegion region_;
  std::vector<uint32_t> free_;
  uint64_t next_value_ = 1;
};

// The word of a slot in a mapped table; slot < kTicketSlots.
const std::atomic<uint64_t>* ticket_word(const std::byte* table, uint32_t slot);

}  // namespace tandem::comm
