// Result<T>: a value, or an Error whose fault lies with a user, a peer, a file or the network.
#pragma once

#include <fmt/format.h>

#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "src/base/check.h"

namespace tandem {

// What kind of fault it is; src/api maps each to one HTTP status.
enum class ErrorKind {
  kInvalidArgument,    // the caller can fix the request (400)
  kNotFound,           // unknown model, route or id (404)
  kTooLarge,           // body or header over its limit (413)
  kUnauthenticated,    // missing or wrong key (401)
  kResourceExhausted,  // a bounded queue is full (429)
  kUnavailable,        // could work later or elsewhere (503)
  kDeadlineExceeded,   // the request's deadline passed (504)
  kAborted,            // cancelled by its client (499)
  kDataLoss,           // a file or a message is damaged (500)
  kUnsupported,        // understood, but this build or model cannot do it (501 or refusal at start)
  kInternal,           // everything else (500)
};

// Short stable name of a kind, e.g. "invalid_argument"; used in logs and metrics.
const char* error_kind_name(ErrorKind kind);

struct Error {
  ErrorKind kind = ErrorKind::kInternal;
  std::string message;  // says the value, the limit and the remedy; safe to show to a client
  std::string param;    // the request field at fault, or empty
  std::string code;     // machine-readable detail such as "context_length_exceeded", or empty
};

template <typename... Args>
Error make_error(ErrorKind kind, fmt::format_string<Args...> format, Args&&... args) {
  return Error{kind, fmt::format(format, std::forward<Args>(args)...), "", ""};
}

// Shorthand for the commonest fault; `param` names the request field or file key.
template <typename... Args>
Error invalid_argument(std::string param, fmt::format_string<Args...> format, Args&&... args) {
  return Error{ErrorKind::kInvalidArgument, fmt::format(format, std::forward<Args>(args)...), std::move(param), ""};
}

// Holds a T or an Error. value() of a failed result is a bug and stops the process.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}       // NOLINT: implicit on purpose
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}  // NOLINT: implicit on purpose

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }

  const T& value() const& { return expect_ok(), std::get<0>(state_); }
  T& value() & { return expect_ok(), std::get<0>(state_); }
  T&& value() && { return expect_ok(), std::get<0>(std::move(state_)); }
  const T* operator->() const { return &value(); }
  T* operator->() { return &value(); }
  const T& operator*() const& { return value(); }
  T& operator*() & { return value(); }
  T&& operator*() && { return std::move(*this).value(); }

  const Error& error() const& {
    CHECK(!ok());
    return std::get<1>(state_);
  }
  Error&& error() && {
    CHECK(!ok());
    return std::get<1>(std::move(state_));
  }

 private:
  void expect_ok() const {
    if (!ok()) [[unlikely]]
      fail_check(__FILE__, __LINE__, "value() of a failed Result: " + std::get<1>(state_).message);
  }
  std::variant<T, Error> state_;
};

// Success, or an Error.
template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Error error) : error_(std::move(error)) {}  // NOLINT: implicit on purpose
  bool ok() const { return !error_.has_value(); }
  explicit operator bool() const { return ok(); }
  const Error& error() const {
    CHECK(!ok());
    return *error_;
  }

 private:
  std::optional<Error> error_;
};

using Status = Result<void>;

}  // namespace tandem

// Returns the error of `expression` (a Status) from the enclosing function, if it has one.
#define TANDEM_TRY(expression)                      \
  do {                                              \
    auto try_status_ = (expression);                \
    if (!try_status_.ok()) return std::move(try_status_).error(); \
  } while (false)

#define TANDEM_CONCAT_INNER(a, b) a##b
#define TANDEM_CONCAT(a, b) TANDEM_CONCAT_INNER(a, b)

// `TANDEM_ASSIGN(const Config config, load(path));` declares `config` or returns the error.
#define TANDEM_ASSIGN(declaration, ...)                                                      \
  auto TANDEM_CONCAT(result_, __LINE__) = (__VA_ARGS__);                                     \
  if (!TANDEM_CONCAT(result_, __LINE__).ok()) return std::move(TANDEM_CONCAT(result_, __LINE__)).error(); \
  declaration = std::move(TANDEM_CONCAT(result_, __LINE__)).value()
