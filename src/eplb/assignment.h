// The assignment problem: who takes whose place, so that as much as possible stays.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tandem::eplb {

// `gains` is [n, n]. Returns the column of each row, each used once, with the largest sum of gains. Exact, O(n³): the
// shortest augmenting path form of the Hungarian method (H. Kuhn 1955; J. Munkres 1957; R. Jonker and A. Volgenant
// 1987).
std::vector<int32_t> assign_best(std::span<const int32_t> gains, int64_t n);

}  // namespace tandem::eplb
