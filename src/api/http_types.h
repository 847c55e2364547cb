// What the HTTP server and client share: headers, URLs, methods of both sides' messages. No Asio or Beast here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/base/result.h"

namespace tandem::api {

// In order of appearance; names keep their spelling and are compared without case.
using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

bool equal_ignoring_case(std::string_view a, std::string_view b);
// The first header of that name, or null.
const std::string* find_header(const HttpHeaders& headers, std::string_view name);
// Of a Content-Type, whatever parameters it has.
bool is_json_type(std::string_view type);

// "http://host:port/path"; https is refused, since nothing here speaks TLS.
struct HttpUrl {
  std::string host;  // a name, an IPv4 address, or an IPv6 address without brackets
  uint16_t port = 80;
  std::string path;  // "" or starting with '/', without a trailing '/'

  std::string origin() const;  // "host:port", brackets around IPv6
};
// The scheme may be missing ("127.0.0.1:8000"). Errors name the whole text.
Result<HttpUrl> parse_http_url(std::string_view text);

// Inverse of percent encoding; false if a '%' is not followed by two hex digits.
bool decode_percent(std::string_view text, std::string& out);

// "OK", "Not Found", …; "Unknown" for a status not in the table.
std::string_view status_text(int status);

}  // namespace tandem::api
