// Strong ids: integers that cannot be mixed up with each other.
#pragma once

#include <fmt/format.h>

#include <compare>
#include <cstdint>
#include <functional>

namespace tandem {

template <typename Tag, typename Rep>
struct StrongId {
  Rep value{};

  constexpr StrongId() = default;
  constexpr explicit StrongId(Rep v) : value(v) {}
  constexpr auto operator<=>(const StrongId&) const = default;
};

// A block of the paged KV pool, 0 … num_blocks - 1.
using BlockId = StrongId<struct BlockIdTag, int32_t>;
// A request (one sequence of tokens) inside one engine process; never reused while the process lives.
using RequestId = StrongId<struct RequestIdTag, uint64_t>;

using TokenId = int32_t;  // a vocabulary index; plain because it is the engine's main payload

}  // namespace tandem

template <typename Tag, typename Rep>
struct std::hash<tandem::StrongId<Tag, Rep>> {
  size_t operator()(const tandem::StrongId<Tag, Rep>& id) const noexcept { return std::hash<Rep>{}(id.value); }
};

template <typename Tag, typename Rep>
struct fmt::formatter<tandem::StrongId<Tag, Rep>> : fmt::formatter<Rep> {
  template <typename Context>
  auto format(const tandem::StrongId<Tag, Rep>& id, Context& context) const {
    return fmt::formatter<Rep>::format(id.value, context);
  }
};
