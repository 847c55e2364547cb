#include "src/transfer/handle.h"

#include <fmt/format.h>

#include <charconv>

#include "src/base/clock.h"

namespace tandem::transfer {
namespace {

int hex_value(char digit) {
  if (digit >= '0' && digit <= '9') return digit - '0';
  if (digit >= 'a' && digit <= 'f') return digit - 'a' + 10;
  return -1;
}

}  // namespace

std::string Handle::to_string() const {
  std::string text = fmt::format("{}-", request);
  for (uint8_t byte : nonce) text += fmt::format("{:02x}", byte);
  return text;
}

std::string Handle::short_name() const {
  return fmt::format("{}-{:02x}{:02x}{:02x}{:02x}", request, nonce[0], nonce[1], nonce[2], nonce[3]);
}

Handle make_handle(uint64_t request) {
  Handle handle;
  handle.request = request;
  const std::array<uint64_t, 2> bits = {random_u64(), random_u64()};
  std::memcpy(handle.nonce.data(), bits.data(), handle.nonce.size());
  return handle;
}

std::optional<Handle> parse_handle(std::string_view text) {
  Handle handle;
  const size_t dash = text.find('-');
  if (dash == std::string_view::npos || dash == 0 || text.size() != dash + 1 + 2 * handle.nonce.size())
    return std::nullopt;
  if (dash > 1 && text[0] == '0') return std::nullopt;
  const char* number_end = text.data() + dash;
  const std::from_chars_result number = std::from_chars(text.data(), number_end, handle.request);
  if (number.ec != std::errc() || number.ptr != number_end) return std::nullopt;
  for (size_t i = 0; i < handle.nonce.size(); ++i) {
    const int high = hex_value(text[dash + 1 + 2 * i]);
    const int low = hex_value(text[dash + 2 + 2 * i]);
    if (high < 0 || low < 0) return std::nullopt;
    handle.nonce[i] = static_cast<uint8_t>(16 * high + low);
  }
  return handle;
}

}  // namespace tandem::transfer
