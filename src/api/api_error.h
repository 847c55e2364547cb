// How a fault looks to an HTTP client: OpenAI's nested shape and one status per kind.
//   {"error":{"message":"…","type":"invalid_request_error","param":"max_tokens","code":null}}
#pragma once

#include <string>
#include <string_view>

#include "src/api/http_types.h"
#include "src/base/result.h"

namespace tandem::api {

struct HttpResponse {
  int status = 200;
  HttpHeaders headers;  // besides Content-Type, Content-Length, Connection and Date
  std::string content_type = "application/json";
  std::string body;
};

// 499 stands for a client that left; it is seen in metrics only.
int http_status(const Error& error);
// Inverse, for clients of our own kind: the Error that a response with this status and body means.
Error error_from_response(int status, std::string_view body);

// `status` overrides http_status() for faults of the HTTP layer itself (405, 408, 411, 414, 415, 417, 431, 501).
std::string error_body(const Error& error, int status);
// With Retry-After on 429 and 503, WWW-Authenticate on 401.
HttpResponse error_response(const Error& error);
HttpResponse error_response(const Error& error, int status);

// A value that came from a user, made fit for a message: at most 64 bytes, control characters escaped.
std::string quote_for_message(std::string_view text);

}  // namespace tandem::api
