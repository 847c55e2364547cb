#include "src/api/json_text.h"

#include <fmt/compile.h>
#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <iterator>

#include "src/base/check.h"

namespace tandem::api {
namespace {

// Length of the valid UTF-8 sequence that `text` starts with; 0 if there is none. After table 3-7 of the Unicode
// standard: no overlong forms, no surrogates, nothing above U+10FFFF.
size_t utf8_sequence_length(std::string_view text) {
  const auto byte = [text](size_t i) { return static_cast<unsigned char>(text[i]); };
  const auto is_continuation = [&](size_t i) { return i < text.size() && (byte(i) & 0xC0) == 0x80; };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return 1;
  if (lead >= 0xC2 && lead <= 0xDF) return is_continuation(1) ? 2 : 0;
  if (lead >= 0xE0 && lead <= 0xEF) {
    if (!is_continuation(1) || !is_continuation(2)) return 0;
    if (lead == 0xE0 && byte(1) < 0xA0) return 0;
    if (lead == 0xED && byte(1) > 0x9F) return 0;
    return 3;
  }
  if (lead >= 0xF0 && lead <= 0xF4) {
    if (!is_continuation(1) || !is_continuation(2) || !is_continuation(3)) return 0;
    if (lead == 0xF0 && byte(1) < 0x90) return 0;
    if (lead == 0xF4 && byte(1) > 0x8F) return 0;
    return 4;
  }
  return 0;
}

}  // namespace

void append_json_string(std::string& out, std::string_view text) {
  out += '"';
  size_t run = 0;  // where the characters begin that are copied as they are
  size_t i = 0;
  const auto replace = [&](std::string_view replacement) {
    out.append(text, run, i - run);
    out += replacement;
    run = i + 1;
  };
  for (; i < text.size(); ++i) {
    const char c = text[i];
    const unsigned char byte = static_cast<unsigned char>(c);
    if (byte >= 0x80) {
      const size_t length = utf8_sequence_length(text.substr(i));
      if (length == 0) {
        replace("\xEF\xBF\xBD");
      } else {
        i += length - 1;
      }
    } else if (c == '"') {
      replace("\\\"");
    } else if (c == '\\') {
      replace("\\\\");
    } else if (c == '\n') {
      replace("\\n");
    } else if (c == '\r') {
      replace("\\r");
    } else if (c == '\t') {
      replace("\\t");
    } else if (byte < 0x20 || byte == 0x7f) {
      replace(fmt::format("\\u{:04x}", byte));
    }
  }
  out.append(text, run);
  out += '"';
}

namespace {
template <typename T>
void append_real(std::string& out, T value) {
  CHECK(std::isfinite(value));
  const size_t start = out.size();
  fmt::format_to(std::back_inserter(out), FMT_COMPILE("{}"), value);
  // A reader that tells integers from floats must see a float.
  if (out.find_first_of(".e", start) == std::string::npos) out += ".0";
}
}  // namespace

void append_json_number(std::string& out, float value) { append_real(out, value); }
void append_json_number(std::string& out, double value) { append_real(out, value); }

void append_json_number(std::string& out, int64_t value) {
  char digits[24];
  const std::to_chars_result end = std::to_chars(digits, digits + sizeof digits, value);
  out.append(digits, end.ptr);
}

int64_t count_code_points(std::string_view text) {
  int64_t count = 0;
  while (!text.empty()) {
    text.remove_prefix(std::max<size_t>(utf8_sequence_length(text), 1));
    ++count;
  }
  return count;
}

}  // namespace tandem::api
