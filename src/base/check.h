// CHECK macros: a failed check is a bug of ours, so the process prints both values and stops.
// Faults of users, peers, files and networks are values (result.h), never checks.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>

namespace tandem {

// Prints "file:line: what" to stderr and aborts.
[[noreturn]] void fail_check(const char* file, int line, std::string_view what);

// Called first by a failed check of this thread, if set. It may throw: in a simulation a bug ends one run, not the
// process. Gives the former one.
using CheckHandler = void (*)(const char* file, int line, std::string_view what);
CheckHandler set_check_handler(CheckHandler handler);

namespace internal {

template <typename T>
std::string show(const T& value) {
  if constexpr (std::is_enum_v<T>) {
    return fmt::format("{}", static_cast<long long>(value));
  } else if constexpr (fmt::is_formattable<T>::value) {
    return fmt::format("{}", value);
  } else {
    return "?";
  }
}

template <typename A, typename B>
[[noreturn]] void fail_comparison(const char* file, int line, const char* text, const A& a, const B& b) {
  fail_check(file, line, fmt::format("CHECK failed: {} ({} vs {})", text, show(a), show(b)));
}

}  // namespace internal
}  // namespace tandem

#define CHECK(condition)                                                                      \
  do {                                                                                        \
    if (!(condition)) [[unlikely]]                                                            \
      ::tandem::fail_check(__FILE__, __LINE__, "CHECK failed: " #condition);                  \
  } while (false)

#define TANDEM_CHECK_OP(op, a, b)                                                             \
  do {                                                                                        \
    const auto& check_a_ = (a);                                                               \
    const auto& check_b_ = (b);                                                               \
    if (!(check_a_ op check_b_)) [[unlikely]]                                                 \
      ::tandem::internal::fail_comparison(__FILE__, __LINE__, #a " " #op " " #b, check_a_, check_b_); \
  } while (false)

#define CHECK_EQ(a, b) TANDEM_CHECK_OP(==, a, b)
#define CHECK_NE(a, b) TANDEM_CHECK_OP(!=, a, b)
#define CHECK_LT(a, b) TANDEM_CHECK_OP(<, a, b)
#define CHECK_LE(a, b) TANDEM_CHECK_OP(<=, a, b)
#define CHECK_GT(a, b) TANDEM_CHECK_OP(>, a, b)
#define CHECK_GE(a, b) TANDEM_CHECK_OP(>=, a, b)
