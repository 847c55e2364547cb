// A bell: one thread sleeps on it, any thread of any process that maps its memory may ring it.
//
// It lies in shared memory and is a futex underneath, so ringing costs no system call while nobody sleeps. A ring wakes,
// it carries nothing: whoever wakes looks at the state it waits for, and sleeps again if that has not come.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace tandem::comm {

class Bell {
 public:
  static constexpr int64_t kBytes = 64;

  // `memory`: kBytes, aligned to 64, zeroed before its first use; must outlive the bell. Several bells, also of
  // different processes, over the same memory are one.
  explicit Bell(std::byte* memory);

  // Wakes who sleeps, and keeps who was about to sleep awake.
  void ring();
  // How often it rang. Read it, look whether there is something to do, and wait(count) if not.
  uint32_t count() const;
  // Sleeps until count() differs from `seen`, at most `timeout_us`.
  void wait(uint32_t seen, int64_t timeout_us);

 private:
  struct Words {
    std::atomic<uint32_t> count;
    std::atomic<uint32_t> sleepers;
  };
  static_assert(sizeof(Words) <= kBytes && std::atomic<uint32_t>::is_always_lock_free);
  Words* words_;
};

}  // namespace tandem::comm
