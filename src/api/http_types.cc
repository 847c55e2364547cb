#include "src/api/http_types.h"

#include <algorithm>
#include <array>
#include <charconv>

namespace tandem::api {
namespace {

char to_lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

int hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  c = to_lower(c);
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

}  // namespace

bool equal_ignoring_case(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](char x, char y) { return to_lower(x) == to_lower(y); });
}

const std::string* find_header(const HttpHeaders& headers, std::string_view name) {
  for (const auto& [key, value] : headers) {
    if (equal_ignoring_case(key, name)) return &value;
  }
  return nullptr;
}

bool is_json_type(std::string_view type) {
  const std::string_view essence = type.substr(0, type.find(';'));
  const size_t last = essence.find_last_not_of(" \t");
  return last != std::string_view::npos && equal_ignoring_case(essence.substr(0, last + 1), "application/json");
}

std::string HttpUrl::origin() const {
  const bool ipv6 = host.find(':') != std::string::npos;
  return fmt::format("{}{}{}:{}", ipv6 ? "[" : "", host, ipv6 ? "]" : "", port);
}

Result<HttpUrl> parse_http_url(std::string_view text) {
  const auto refuse = [text](std::string_view why) {
    return invalid_argument("url", "'{}' is not an http URL: {}; expected http://host:port[/path]", text, why);
  };
  std::string_view rest = text;
  if (const size_t colon = rest.find("://"); colon != std::string_view::npos) {
    if (!equal_ignoring_case(rest.substr(0, colon), "http")) return refuse("only the scheme http is supported");
    rest.remove_prefix(colon + 3);
  }
  HttpUrl url;
  const size_t slash = std::min(rest.find('/'), rest.size());
  std::string_view authority = rest.substr(0, slash);
  url.path = rest.substr(slash);
  while (!url.path.empty() && url.path.back() == '/') url.path.pop_back();
  for (const char c : rest) {
    if (c <= ' ' || c == '@' || c == '?' || c == '#' || c == 0x7f) return refuse("a character that does not belong");
  }
  std::string_view port_text;
  bool has_port = false;
  if (!authority.empty() && authority[0] == '[') {
    const size_t close = authority.find(']');
    if (close == std::string_view::npos) return refuse("no ']' after an IPv6 address");
    url.host = authority.substr(1, close - 1);
    authority.remove_prefix(close + 1);
    if (!authority.empty()) {
      if (authority[0] != ':') return refuse("no ':' before the port");
      has_port = true;
      port_text = authority.substr(1);
    }
  } else {
    const size_t colon = authority.find(':');
    has_port = colon != std::string_view::npos;
    url.host = authority.substr(0, colon);
    if (has_port) port_text = authority.substr(colon + 1);
  }
  if (url.host.empty()) return refuse("no host");
  if (has_port) {
    unsigned port = 0;
    const auto [end, ec] = std::from_chars(port_text.data(), port_text.data() + port_text.size(), port);
    if (ec != std::errc() || end != port_text.data() + port_text.size() || port == 0 || port > 65535) {
      return refuse("the port must be 1 … 65535");
    }
    url.port = static_cast<uint16_t>(port);
  }
  return url;
}

bool decode_percent(std::string_view text, std::string& out) {
  out.clear();
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    if (i + 2 >= text.size()) return false;
    const int high = hex_value(text[i + 1]);
    const int low = hex_value(text[i + 2]);
    if (high < 0 || low < 0) return false;
    out += static_cast<char>(high * 16 + low);
    i += 2;
  }
  return true;
}

std::string_view status_text(int status) {
  struct Entry {
    int status;
    std::string_view text;
  };
  static constexpr std::array kTable = {
      Entry{100, "Continue"},
      Entry{200, "OK"},
      Entry{204, "No Content"},
      Entry{400, "Bad Request"},
      Entry{401, "Unauthorized"},
      Entry{403, "Forbidden"},
      Entry{404, "Not Found"},
      Entry{405, "Method Not Allowed"},
      Entry{408, "Request Timeout"},
      Entry{411, "Length Required"},
      Entry{413, "Content Too Large"},
      Entry{414, "URI Too Long"},
      Entry{415, "Unsupported Media Type"},
      Entry{417, "Expectation Failed"},
      Entry{429, "Too Many Requests"},
      Entry{431, "Request Header Fields Too Large"},
      Entry{499, "Client Closed Request"},
      Entry{500, "Internal Server Error"},
      Entry{501, "Not Implemented"},
      Entry{503, "Service Unavailable"},
      Entry{504, "Gateway Timeout"},
      Entry{505, "HTTP Version Not Supported"},
  };
  for (const Entry& entry : kTable) {
    if (entry.status == status) return entry.text;
  }
  return "Unknown";
}

}  // namespace tandem::api
