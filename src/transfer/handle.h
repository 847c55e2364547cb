// The name of one transfer, made by the side that reserves or publishes blocks, and valid once.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

namespace tandem::transfer {

// The nonce is drawn by the kernel: who does not know it cannot name the transfer, and a restarted process never
// makes the same one again. `request` only helps to find the lines of a log.
struct Handle {
  uint64_t request = 0;
  std::array<uint8_t, 16> nonce{};

  auto operator<=>(const Handle&) const = default;
  std::string to_string() const;  // "<request>-<32 hex digits>"
  // For logs and messages, where the whole nonce would let a reader take part: "<request>-<8 hex digits>".
  std::string short_name() const;
};

Handle make_handle(uint64_t request);
// Nothing unless `text` is exactly what to_string() gives for some handle.
std::optional<Handle> parse_handle(std::string_view text);

}  // namespace tandem::transfer

template <>
struct std::hash<tandem::transfer::Handle> {
  size_t operator()(const tandem::transfer::Handle& handle) const noexcept {
    size_t value = 0;
    std::memcpy(&value, handle.nonce.data(), sizeof value);
    return value;
  }
};
