#include "src/model/routing_simulation.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include "src/base/check.h"

namespace tandem::model {
namespace {

// Beyond it nearly all tokens choose the same experts.
constexpr double kMaxAlpha = 4;

// The finaliser of splitmix64 (G. Steele, D. Lea, C. Flood 2014).
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

uint64_t mix_with(uint64_t key, uint64_t value) { return mix(key ^ mix(value)); }

uint64_t below(uint64_t bits, uint64_t count) { return ((bits >> 32) * count) >> 32; }

double unit(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1.0p-53; }

bool contains(std::span<const int32_t> values, int32_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

}  // namespace

std::string RoutingSimulation::describe() const {
  switch (kind) {
    case RoutingKind::kReal:
      return "real";
    case RoutingKind::kUniform:
      return fmt::format("uniform_random, seed {}", seed);
    case RoutingKind::kZipf:
      return fmt::format("zipf:{}, seed {}", alpha, seed);
    case RoutingKind::kBalanced:
      return fmt::format("balanced, seed {}", seed);
  }
  return "?";
}

Result<RoutingSimulation> parse_routing_simulation(std::string_view text, uint64_t seed) {
  if (text.empty()) return RoutingSimulation{};
  if (text == "uniform_random") return RoutingSimulation{RoutingKind::kUniform, 0, seed};
  if (text == "balanced") return RoutingSimulation{RoutingKind::kBalanced, 0, seed};
  constexpr std::string_view kZipfPrefix = "zipf:";
  if (text.substr(0, kZipfPrefix.size()) == kZipfPrefix) {
    const std::string_view number = text.substr(kZipfPrefix.size());
    double alpha = 0;
    const std::from_chars_result parsed = std::from_chars(number.data(), number.data() + number.size(), alpha);
    const bool is_number = parsed.ec == std::errc() && parsed.ptr == number.data() + number.size();
    if (is_number && alpha >= 0 && alpha <= kMaxAlpha) return RoutingSimulation{RoutingKind::kZipf, alpha, seed};
  }
  return invalid_argument("moe-routing-simulation",
                          "--moe-routing-simulation is '{}'; it must be uniform_random, balanced or zipf:ALPHA with "
                          "ALPHA from 0 to {}, for example zipf:0.6",
                          text, kMaxAlpha);
}

SimulatedRouter::SimulatedRouter(const RoutingSimulation& simulation, int64_t num_layers, int64_t num_experts,
                                 int64_t top_k)
    : simulation_(simulation), num_experts_(num_experts) {
  CHECK(simulation.is_on());
  CHECK_LE(top_k, num_experts);
  double sum = 0;
  for (int64_t r = 1; r <= num_experts; ++r) {
    cumulative_.push_back(sum += std::pow(static_cast<double>(r), -simulation.alpha));
  }
  for (int64_t l = 0; l < num_layers; ++l) {
    std::vector<int32_t>& order = order_.emplace_back(static_cast<size_t>(num_experts));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i) {
      const uint64_t bits = mix_with(mix_with(simulation.seed, static_cast<uint64_t>(l)), i);
      std::swap(order[i - 1], order[below(bits, i)]);
    }
  }
}

void SimulatedRouter::choose(int64_t layer, const Row& row, std::span<int32_t> experts) const {
  uint64_t key = mix_with(simulation_.seed, static_cast<uint64_t>(layer));
  const int64_t top_k = static_cast<int64_t>(experts.size());
  if (simulation_.kind == RoutingKind::kBalanced) {
    const uint64_t count = static_cast<uint64_t>(num_experts_);
    uint64_t first = below(key, count);
    if (row.is_prompt) {
      first += static_cast<uint64_t>(row.position * top_k);
    } else {
      first +=
          below(mix_with(mix_with(key, static_cast<uint64_t>(row.position)), static_cast<uint64_t>(row.token)), count);
    }
    for (size_t j = 0; j < experts.size(); ++j) experts[j] = static_cast<int32_t>((first + j) % count);
    return;
  }
  key = mix_with(key, static_cast<uint64_t>(row.position));
  key = mix_with(key, static_cast<uint64_t>(row.token));
  choose_weighted(layer, key, experts);
}

// Draws by weight among those not drawn yet: again when a draw hits one of them, and over what is left when that takes
// too long. Both give the same distribution.
void SimulatedRouter::choose_weighted(int64_t layer, uint64_t key, std::span<int32_t> experts) const {
  constexpr int kTries = 16;
  const std::vector<int32_t>& order = order_[static_cast<size_t>(layer)];
  std::vector<int32_t> ranks;
  uint64_t draw = 0;
  while (ranks.size() < experts.size()) {
    int32_t rank = -1;
    for (int i = 0; i < kTries && (rank < 0 || contains(ranks, rank)); ++i) {
      const double point = unit(mix_with(key, draw++)) * cumulative_.back();
      const auto found = std::upper_bound(cumulative_.begin(), cumulative_.end() - 1, point);
      rank = static_cast<int32_t>(found - cumulative_.begin());
    }
    if (contains(ranks, rank)) {
      const auto weight = [&](int32_t r) {
        const size_t i = static_cast<size_t>(r);
        return contains(ranks, r) ? 0.0 : cumulative_[i] - (i == 0 ? 0.0 : cumulative_[i - 1]);
      };
      double left = 0;
      for (int32_t r = 0; r < num_experts_; ++r) left += weight(r);
      double point = unit(mix_with(key, draw++)) * left;
      rank = -1;
      for (int32_t r = 0; r < num_experts_ && point >= 0; ++r) {
        if (contains(ranks, r)) continue;
        rank = r;
        point -= weight(r);
      }
    }
    experts[ranks.size()] = order[static_cast<size_t>(rank)];
    ranks.push_back(rank);
  }
}

}  // namespace tandem::model
