#include "src/base/clock.h"

#include <sys/random.h>

#include <array>
#include <chrono>
#include <cstring>
#include <utility>

#include "src/base/check.h"

namespace tandem {

int64_t SteadyClock::now_us() const {
  const std::chrono::steady_clock::duration since_boot = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::microseconds>(since_boot).count();
}

int64_t unix_time_s() {
  const std::chrono::system_clock::duration since_1970 = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::seconds>(since_1970).count();
}

// A system call for many numbers at once: a request needs several. A forked child would draw its parent's numbers
// again, but every child of ours becomes another program at once.
uint64_t random_u64() {
  constexpr size_t kNumbers = 32;  // 256 bytes: the kernel gives them whole, whatever signals come
  thread_local std::array<uint64_t, kNumbers> numbers;
  thread_local size_t num_left = 0;
  if (num_left == 0) {
    const ssize_t got = getrandom(numbers.data(), sizeof numbers, 0);
    CHECK_EQ(got, static_cast<ssize_t>(sizeof numbers));
    num_left = kNumbers;
  }
  return std::exchange(numbers[--num_left], 0);  // nobody may find a number that was given away
}

std::string random_hex(size_t bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * bytes);
  uint64_t pool = 0;
  for (size_t i = 0; i < bytes; ++i) {
    if (i % 8 == 0) pool = random_u64();
    const uint64_t byte = (pool >> (8 * (i % 8))) & 0xff;
    text.push_back(kDigits[byte >> 4]);
    text.push_back(kDigits[byte & 15]);
  }
  return text;
}

}  // namespace tandem
