// Typed reading of a JSON object from a client. Null counts as absent, nothing is coerced, and the first fault is kept
// with the name of its field, so that a parser can read on and ask once at the end.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "src/api/strict_json.h"
#include "src/base/result.h"

namespace tandem::api {

class RequestFields {
 public:
  // `object` must outlive this and be a JSON object; `prefix` is put before names in errors ("stream_options.").
  explicit RequestFields(const Json& object, std::string prefix = "");

  // The member, or null if it is absent or JSON null.
  const Json* find(std::string_view name) const;

  // Within [min, max], else the fault says value and range. 1.0 is not an integer, 1 is a number.
  std::optional<int64_t> integer(std::string_view name, int64_t min, int64_t max);
  std::optional<double> number(std::string_view name, double min, double max);
  std::optional<bool> boolean(std::string_view name);
  const std::string* text(std::string_view name, size_t max_bytes);
  const Json* array(std::string_view name, size_t max_size);
  const Json* object(std::string_view name);

  void fail(Error error);
  // `why` completes "'name' …".
  void fail_value(std::string_view name, std::string_view why);
  void fail_type(std::string_view name, std::string_view expected);
  bool failed() const { return error_.has_value(); }
  const Error& error() const { return *error_; }

 private:
  const Json& object_;
  std::string prefix_;
  std::optional<Error> error_;
};

// A fault of one field: 400 with param and code.
Error field_error(std::string param, std::string code, std::string message);

}  // namespace tandem::api
