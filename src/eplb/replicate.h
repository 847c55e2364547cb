// How many copies each expert gets.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tandem::eplb {

// Gives every expert one copy and each further slot to the expert whose copies carry most, ties to the lowest index;
// none gets more than `max_copies`. That makes the largest share of a copy as small as it can be.
std::vector<int32_t> replicate(std::span<const double> weights, int64_t num_slots, int64_t max_copies);

// As replicate, from given copies and by as few changes as possible: a copy passes from the expert that misses it least
// to the one that needs it most, until that lowers the largest share no more or the largest is at most `enough`.
std::vector<int32_t> shift_copies(std::span<const double> weights, std::vector<int32_t> copies, int64_t max_copies,
                                  double enough);

}  // namespace tandem::eplb
