// Loads for tests: skewed as measured ones are, from a printed seed.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "src/eplb/expert_load.h"
#include "src/eplb/placement.h"

namespace tandem::eplb {

using RandomBits = std::mt19937_64;  // its bits are the same everywhere; the distributions of <random> are not

inline double uniform(RandomBits& random) { return static_cast<double>(random() >> 11) * 0x1.0p-53; }
inline int64_t below(RandomBits& random, int64_t count) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(count));
}

// Zipf popularity with exponent `alpha`, every layer shuffled by itself, `tokens` in all per layer or so.
inline ExpertLoad zipf_load(RandomBits& random, int64_t layers, int64_t experts, double alpha, double tokens = 1e7) {
  ExpertLoad load(layers, experts);
  std::vector<double> weights(static_cast<size_t>(experts));
  double sum = 0;
  for (size_t e = 0; e < weights.size(); ++e) sum += weights[e] = std::pow(static_cast<double>(e + 1), -alpha);
  for (int64_t l = 0; l < layers; ++l) {
    for (size_t e = weights.size(); e > 1; --e) {
      std::swap(weights[e - 1], weights[static_cast<size_t>(below(random, static_cast<int64_t>(e)))]);
    }
    for (size_t e = 0; e < weights.size(); ++e) load.layer(l)[e] = std::llround(weights[e] / sum * tokens);
  }
  return load;
}

// Every count times a factor within 1 ± drift.
inline ExpertLoad drifted(RandomBits& random, const ExpertLoad& load, double drift) {
  ExpertLoad next = load;
  for (int64_t l = 0; l < load.num_layers(); ++l) {
    for (int64_t& tokens : next.layer(l)) {
      tokens = std::llround(static_cast<double>(tokens) * (1 + drift * (2 * uniform(random) - 1)));
    }
  }
  return next;
}

inline ExpertLoad load_of(const std::vector<std::vector<int64_t>>& layers) {
  ExpertLoad load(std::ssize(layers), std::ssize(layers.front()));
  for (size_t l = 0; l < layers.size(); ++l) {
    std::copy(layers[l].begin(), layers[l].end(), load.layer(static_cast<int64_t>(l)).begin());
  }
  return load;
}

// No rank holds two copies of an expert.
inline bool has_duplicates(const Placement& placement) {
  const size_t per_rank = static_cast<size_t>(placement.slots_per_rank());
  for (int64_t l = 0; l < placement.num_layers(); ++l) {
    for (size_t first = 0; first < placement.layer(l).size(); first += per_rank) {
      const std::span<const int32_t> slots = placement.layer(l).subspan(first, per_rank);
      std::vector<int32_t> sorted(slots.begin(), slots.end());
      std::sort(sorted.begin(), sorted.end());
      if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) return true;
    }
  }
  return false;
}

}  // namespace tandem::eplb
