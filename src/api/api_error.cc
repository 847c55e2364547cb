#include "src/api/api_error.h"

#include <nlohmann/json.hpp>

#include "src/api/json_text.h"

namespace tandem::api {
namespace {

constexpr int kRetryAfterSeconds = 1;
constexpr size_t kMaxQuotedBytes = 64;

std::string_view error_type(int status) {
  if (status == 403) return "permission_error";
  if (status == 429) return "rate_limit_error";
  if (status == 503) return "service_unavailable_error";
  return status >= 500 && status != 501 ? "server_error" : "invalid_request_error";
}

std::string_view default_code(int status) {
  switch (status) {
    case 413:
      return "request_too_large";
    case 429:
      return "queue_full";
    case 500:
      return "internal_error";
    case 503:
      return "server_is_overloaded";
    case 504:
      return "upstream_timeout";
    default:
      return "";
  }
}

void append_or_null(std::string& out, std::string_view text) {
  if (text.empty()) {
    out += "null";
  } else {
    append_json_string(out, text);
  }
}

ErrorKind kind_of_status(int status) {
  switch (status) {
    case 401:
      return ErrorKind::kUnauthenticated;
    case 404:
      return ErrorKind::kNotFound;
    case 413:
      return ErrorKind::kTooLarge;
    case 429:
      return ErrorKind::kResourceExhausted;
    case 499:
      return ErrorKind::kAborted;
    case 501:
      return ErrorKind::kUnsupported;
    case 408:
    case 504:
      return ErrorKind::kDeadlineExceeded;
    case 502:
    case 503:
      return ErrorKind::kUnavailable;
    default:
      return status >= 400 && status < 500 ? ErrorKind::kInvalidArgument : ErrorKind::kInternal;
  }
}

}  // namespace

int http_status(const Error& error) {
  switch (error.kind) {
    case ErrorKind::kInvalidArgument:
      return 400;
    case ErrorKind::kNotFound:
      return 404;
    case ErrorKind::kTooLarge:
      return 413;
    case ErrorKind::kUnauthenticated:
      return 401;
    case ErrorKind::kResourceExhausted:
      return 429;
    case ErrorKind::kUnavailable:
      return 503;
    case ErrorKind::kDeadlineExceeded:
      return 504;
    case ErrorKind::kAborted:
      return 499;
    case ErrorKind::kDataLoss:
      return 500;
    case ErrorKind::kUnsupported:
      return 501;
    case ErrorKind::kInternal:
      return 500;
  }
  return 500;
}

Error error_from_response(int status, std::string_view body) {
  Error error = make_error(kind_of_status(status), "the server answered with status {}", status);
  const nlohmann::json json = nlohmann::json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("error") || !json["error"].is_object()) return error;
  const auto text = [&json](const char* key) {
    const auto found = json["error"].find(key);
    return found != json["error"].end() && found->is_string() ? found->get<std::string>() : std::string();
  };
  if (const std::string message = text("message"); !message.empty()) error.message = message;
  error.param = text("param");
  error.code = text("code");
  return error;
}

std::string error_body(const Error& error, int status) {
  std::string out = "{\"error\":{\"message\":";
  append_json_string(out, error.message);
  out += ",\"type\":";
  append_json_string(out, error_type(status));
  out += ",\"param\":";
  append_or_null(out, error.param);
  out += ",\"code\":";
  append_or_null(out, error.code.empty() ? default_code(status) : std::string_view(error.code));
  out += "}}";
  return out;
}

HttpResponse error_response(const Error& error) { return error_response(error, http_status(error)); }

HttpResponse error_response(const Error& error, int status) {
  HttpResponse response;
  response.status = status;
  response.body = error_body(error, status);
  if (status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  if (status == 429 || status == 503) response.headers.emplace_back("Retry-After", std::to_string(kRetryAfterSeconds));
  return response;
}

std::string quote_for_message(std::string_view text) {
  std::string out;
  append_json_string(out, text.substr(0, kMaxQuotedBytes));
  if (text.size() > kMaxQuotedBytes) out += "…";
  return out;
}

}  // namespace tandem::api
