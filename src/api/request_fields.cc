#include "src/api/request_fields.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "src/api/api_error.h"

namespace tandem::api {

Error field_error(std::string param, std::string code, std::string message) {
  return Error{ErrorKind::kInvalidArgument, std::move(message), std::move(param), std::move(code)};
}

RequestFields::RequestFields(const Json& object, std::string prefix) : object_(object), prefix_(std::move(prefix)) {
  CHECK(object.is_object());
}

const Json* RequestFields::find(std::string_view name) const {
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

std::optional<int64_t> RequestFields::integer(std::string_view name, int64_t min, int64_t max) {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number_integer()) {
    fail_type(name, "an integer");
    return std::nullopt;
  }
  const bool too_large = value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  const int64_t number = too_large ? 0 : value->get<int64_t>();
  if (too_large || number < min || number > max) {
    fail_value(name, fmt::format("is {}, must be between {} and {}", value->dump(), min, max));
    return std::nullopt;
  }
  return number;
}

std::optional<double> RequestFields::number(std::string_view name, double min, double max) {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number()) {
    fail_type(name, "a number");
    return std::nullopt;
  }
  const double number = value->get<double>();
  // Written so that NaN fails too, although the JSON parser lets none pass.
  if (!(std::isfinite(number) && number >= min && number <= max)) {
    fail_value(name, fmt::format("is {}, must be between {} and {}", number, min, max));
    return std::nullopt;
  }
  return number;
}

std::optional<bool> RequestFields::boolean(std::string_view name) {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) {
    fail_type(name, "true or false");
    return std::nullopt;
  }
  return value->get<bool>();
}

const std::string* RequestFields::text(std::string_view name, size_t max_bytes) {
  const Json* value = find(name);
  if (value == nullptr) return nullptr;
  const std::string* text = value->get_ptr<const std::string*>();
  if (text == nullptr) {
    fail_type(name, "a string");
  } else if (text->size() > max_bytes) {
    fail_value(name, fmt::format("has {} bytes, the limit is {}", text->size(), max_bytes));
    return nullptr;
  }
  return text;
}

const Json* RequestFields::array(std::string_view name, size_t max_size) {
  const Json* value = find(name);
  if (value == nullptr) return nullptr;
  if (!value->is_array()) {
    fail_type(name, "an array");
    return nullptr;
  }
  if (value->size() > max_size) {
    fail_value(name, fmt::format("has {} elements, the limit is {}", value->size(), max_size));
    return nullptr;
  }
  return value;
}

const Json* RequestFields::object(std::string_view name) {
  const Json* value = find(name);
  if (value == nullptr || value->is_object()) return value;
  fail_type(name, "an object");
  return nullptr;
}

void RequestFields::fail(Error error) {
  if (!error_) error_ = std::move(error);
}

void RequestFields::fail_value(std::string_view name, std::string_view why) {
  const std::string param = prefix_ + std::string(name);
  fail(field_error(param, "invalid_value", fmt::format("'{}' {}", param, why)));
}

void RequestFields::fail_type(std::string_view name, std::string_view expected) {
  const std::string param = prefix_ + std::string(name);
  fail(field_error(param, "invalid_type", fmt::format("'{}' must be {}", param, expected)));
}

}  // namespace tandem::api
