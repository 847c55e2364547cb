#include "src/comm/tickets.h"

namespace tandem::comm {
namespace {

std::atomic<uint64_t>* word_of(std::byte* table, uint32_t slot) {
  CHECK_LT(static_cast<int64_t>(slot), kTicketSlots);
  return reinterpret_cast<std::atomic<uint64_t>*>(table + slot * kTicketSlotBytes);
}

}  // namespace

const std::atomic<uint64_t>* ticket_word(const std::byte* table, uint32_t slot) {
  return word_of(const_cast<std::byte*>(table), slot);
}

Result<TicketTable> TicketTable::create() {
  TicketTable table;
  TANDEM_ASSIGN(table.region_, SharedRegion::create("tandem-tickets", kTicketBytes));
  table.free_.reserve(static_cast<size_t>(kTicketSlots));
  for (int64_t slot = kTicketSlots - 1; slot >= 0; --slot) table.free_.push_back(static_cast<uint32_t>(slot));
  return table;
}

std::optional<Ticket> TicketTable::take() {
  if (free_.empty()) return std::nullopt;
  const Ticket ticket{free_.back(), next_value_++};
  free_.pop_back();
  word_of(region_.data(), ticket.slot)->store(ticket.value, std::memory_order_release);
  return ticket;
}

void TicketTable::end(const Ticket& ticket) {
  std::atomic<uint64_t>* const word = word_of(region_.data(), ticket.slot);
  CHECK_EQ(word->load(std::memory_order_relaxed), ticket.value);
  word->store(0, std::memory_order_relaxed);
  // Whatever this process writes from now on comes after it, also in other threads that hear of it from this one.
  std::atomic_thread_fence(std::memory_order_release);
  free_.push_back(ticket.slot);
}

}  // namespace tandem::comm
