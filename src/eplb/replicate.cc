#include "src/eplb/replicate.h"

#include <limits>

#include "src/base/check.h"

namespace tandem::eplb {
namespace {

constexpr size_t kNone = std::numeric_limits<size_t>::max();

size_t find_neediest(std::span<const double> weights, const std::vector<int32_t>& copies, int64_t max_copies) {
  size_t best = kNone;
  for (size_t e = 0; e < copies.size(); ++e) {
    if (copies[e] >= max_copies) continue;
    if (best == kNone || weights[e] / copies[e] > weights[best] / copies[best]) best = e;
  }
  return best;
}

// Its copies would carry least with one fewer.
size_t find_richest(std::span<const double> weights, const std::vector<int32_t>& copies) {
  size_t best = kNone;
  for (size_t e = 0; e < copies.size(); ++e) {
    if (copies[e] < 2) continue;
    if (best == kNone || weights[e] / (copies[e] - 1) < weights[best] / (copies[best] - 1)) best = e;
  }
  return best;
}

}  // namespace

std::vector<int32_t> replicate(std::span<const double> weights, int64_t num_slots, int64_t max_copies) {
  const int64_t num_experts = static_cast<int64_t>(weights.size());
  CHECK_GE(num_slots, num_experts);
  CHECK_LE(num_slots, num_experts * max_copies);
  std::vector<int32_t> copies(weights.size(), 1);
  for (int64_t i = num_experts; i < num_slots; ++i) ++copies[find_neediest(weights, copies, max_copies)];
  return copies;
}

std::vector<int32_t> shift_copies(std::span<const double> weights, std::vector<int32_t> copies, int64_t max_copies,
                                  double enough) {
  while (true) {
    const size_t to = find_neediest(weights, copies, max_copies);
    const size_t from = find_richest(weights, copies);
    if (to == kNone || from == kNone || to == from) return copies;
    const double largest = weights[to] / copies[to];
    if (largest <= enough || weights[from] / (copies[from] - 1) >= largest) return copies;
    --copies[from];
    ++copies[to];
  }
}

}  // namespace tandem::eplb
