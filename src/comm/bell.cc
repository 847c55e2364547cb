#include "src/comm/bell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

#include "src/base/check.h"

namespace tandem::comm {
namespace {

// Shared between processes, hence without FUTEX_PRIVATE_FLAG.
void futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* timeout) {
  ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, timeout, nullptr, 0);
}

}  // namespace

Bell::Bell(std::byte* memory) : words_(reinterpret_cast<Words*>(memory)) {
  CHECK_EQ(reinterpret_cast<uintptr_t>(memory) % kBytes, 0U);
}

// The two sequentially consistent operations here and the two in wait() guarantee that one side sees the other.
void Bell::ring() {
  words_->count.fetch_add(1);
  if (words_->sleepers.load() > 0) futex(&words_->count, FUTEX_WAKE, INT_MAX, nullptr);
}

uint32_t Bell::count() const { return words_->count.load(); }

void Bell::wait(uint32_t seen, int64_t timeout_us) {
  if (timeout_us <= 0) return;
  words_->sleepers.fetch_add(1);
  const timespec timeout{timeout_us / 1'000'000, timeout_us % 1'000'000 * 1000};
  // Ends early by a signal or a spurious wake: allowed by the contract.
  if (words_->count.load() == seen) futex(&words_->count, FUTEX_WAIT, seen, &timeout);
  words_->sleepers.fetch_sub(1);
}

}  // namespace tandem::comm
