// Counter-based random numbers: the number for (seed, position) is the same in every process and after any restart,
// so sampling can move between workers and be replayed.
//
// Philox4x32-10: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <array>
#include <cstdint>

namespace tandem::engine {

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// Uniform in [0, 1) with 53 random bits.
double uniform_at(uint64_t seed, uint64_t position);

}  // namespace tandem::engine
