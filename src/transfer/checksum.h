// A 64-bit checksum against damage in transit, at the speed of memory. Not a defence against an adversary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace tandem::transfer {

// Any change within one aligned 8-byte word is always detected (each step is a bijection of the word and of the
// state); other changes are missed with probability 2^-64.
uint64_t checksum(std::span<const std::byte> data);
// The same of the concatenated pieces.
uint64_t checksum(std::span<const std::span<const std::byte>> pieces);

}  // namespace tandem::transfer
