// Cryptographic hashing for cache keys and compatibility checks: a collision would serve another prompt's KV,
// so nothing weaker than SHA-256 is used.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <string_view>

namespace tandem {

struct Hash256 {
  std::array<uint8_t, 32> bytes{};
  auto operator<=>(const Hash256&) const = default;
  std::string hex() const;
};

// SHA-256 of the concatenated parts. The caller makes the concatenation unambiguous (fixed sizes or lengths).
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  Sha256& add(std::span<const std::byte> data);
  Sha256& add(std::string_view text) { return add(std::as_bytes(std::span(text))); }
  template <typename T>
  Sha256& add_value(const T& value) {
    return add(std::as_bytes(std::span(&value, 1)));
  }
  Hash256 finish();

 private:
  void* context_;
};

}  // namespace tandem

template <>
struct std::hash<tandem::Hash256> {
  size_t operator()(const tandem::Hash256& key) const noexcept {
    size_t value = 0;
    std::memcpy(&value, key.bytes.data(), sizeof value);
    return value;
  }
};
