// A router's choices replaced by chosen statistics, for benchmarks: random weights and random prompts route unlike real
// ones. A choice is a pure function of seed, layer, position and token, so results stay exact; they are nonsense.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/result.h"
#include "src/model/batch.h"

namespace tandem::model {

enum class RoutingKind : uint8_t {
  kReal,
  kUniform,   // top_k different experts, each alike
  kZipf,      // the expert of rank r in a layer's own order of popularity is drawn with weight r^-alpha
  kBalanced,  // consecutive positions of a prompt take the experts in turn; generated tokens begin anywhere
};

struct RoutingSimulation {
  RoutingKind kind = RoutingKind::kReal;
  double alpha = 0;
  uint64_t seed = 0;

  bool is_on() const { return kind != RoutingKind::kReal; }
  std::string describe() const;  // "zipf:0.6, seed 0"
};
// "", "uniform_random", "balanced" or "zipf:ALPHA" with ALPHA from 0 to 4.
Result<RoutingSimulation> parse_routing_simulation(std::string_view text, uint64_t seed);

class SimulatedRouter {
 public:
  SimulatedRouter(const RoutingSimulation& simulation, int64_t num_layers, int64_t num_experts, int64_t top_k);

  struct Row {
    int32_t position = 0;
    TokenId token = 0;
    bool is_prompt = true;
  };
  // Writes the row's top_k different experts in MoE layer `layer`, in the order they were drawn.
  void choose(int64_t layer, const Row& row, std::span<int32_t> experts) const;

 private:
  void choose_weighted(int64_t layer, uint64_t key, std::span<int32_t> experts) const;

  RoutingSimulation simulation_;
  int64_t num_experts_;
  std::vector<double> cumulative_;           // of the weights by popularity
  std::vector<std::vector<int32_t>> order_;  // [layers][experts]: by popularity
};

}  // namespace tandem::model
