#include "src/model/routing_simulation.h"

#include <cmath>
#include <numeric>
#include <set>

#include "src/model/test_support.h"

namespace tandem::model {
namespace {

SimulatedRouter make_router(const std::string& text, int64_t experts, int64_t top_k, uint64_t seed = 1) {
  return SimulatedRouter(parse_routing_simulation(text, seed).value(), 3, experts, top_k);
}

std::vector<int32_t> choice_of(const SimulatedRouter& router, int64_t layer, const SimulatedRouter::Row& row,
                               size_t top_k) {
  std::vector<int32_t> experts(top_k, -1);
  router.choose(layer, row, experts);
  return experts;
}

// Tokens of each expert of layer 0, over `rows` positions with tokens that differ.
std::vector<int64_t> count_choices(const SimulatedRouter& router, int64_t experts, size_t top_k, int32_t rows,
                                   bool is_prompt) {
  std::vector<int64_t> counts(static_cast<size_t>(experts));
  for (int32_t i = 0; i < rows; ++i) {
    for (const int32_t e : choice_of(router, 0, {i, i * 7 % 1000, is_prompt}, top_k)) ++counts[static_cast<size_t>(e)];
  }
  return counts;
}

TEST(RoutingSimulation, RefusesWhatItDoesNotKnow) {
  for (const char* text :
       {"uniform", "zipf", "zipf:", "zipf:x", "zipf:-1", "zipf:5", "zipf:nan", "zipf:1e", "Balanced"}) {
    const Result<RoutingSimulation> parsed = parse_routing_simulation(text, 0);
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_EQ(parsed.error().message,
              fmt::format("--moe-routing-simulation is '{}'; it must be uniform_random, balanced or zipf:ALPHA with "
                          "ALPHA from 0 to 4, for example zipf:0.6",
                          text));
  }
  EXPECT_FALSE(parse_routing_simulation("", 0)->is_on());
}

TEST(RoutingSimulation, ChoosesDifferentExpertsFromItsArgumentsAlone) {
  for (const char* text : {"uniform_random", "zipf:0.6", "zipf:4", "balanced"}) {
    for (const auto& [experts, top_k] : std::vector<std::pair<int64_t, size_t>>{{16, 4}, {8, 8}, {256, 8}, {1, 1}}) {
      const SimulatedRouter router = make_router(text, experts, static_cast<int64_t>(top_k));
      const SimulatedRouter again = make_router(text, experts, static_cast<int64_t>(top_k));
      for (int32_t i = 0; i < 200; ++i) {
        const SimulatedRouter::Row row{i, i % 13, i % 2 == 0};
        const std::vector<int32_t> chosen = choice_of(router, i % 3, row, top_k);
        ASSERT_EQ(std::set<int32_t>(chosen.begin(), chosen.end()).size(), top_k) << text;
        ASSERT_GE(*std::min_element(chosen.begin(), chosen.end()), 0);
        ASSERT_LT(*std::max_element(chosen.begin(), chosen.end()), experts);
        ASSERT_EQ(choice_of(again, i % 3, row, top_k), chosen);
      }
    }
  }
}

TEST(RoutingSimulation, DependsOnSeedLayerPositionAndToken) {
  const SimulatedRouter router = make_router("uniform_random", 256, 8);
  const std::vector<int32_t> chosen = choice_of(router, 0, {10, 20, true}, 8);
  EXPECT_NE(choice_of(router, 1, {10, 20, true}, 8), chosen);
  EXPECT_NE(choice_of(router, 0, {11, 20, true}, 8), chosen);
  EXPECT_NE(choice_of(router, 0, {10, 21, true}, 8), chosen);
  EXPECT_NE(choice_of(make_router("uniform_random", 256, 8, 2), 0, {10, 20, true}, 8), chosen);
}

// Within five standard deviations of a binomial, which is more than they vary when drawn without putting back.
TEST(RoutingSimulation, UniformIsUniform) {
  constexpr int32_t kRows = 20'000;
  const std::vector<int64_t> counts = count_choices(make_router("uniform_random", 64, 4), 64, 4, kRows, true);
  const double mean = kRows * 4.0 / 64;
  for (const int64_t count : counts) EXPECT_LE(std::abs(static_cast<double>(count) - mean), 5 * std::sqrt(mean));
}

// With one expert per token the counts follow the law itself.
TEST(RoutingSimulation, ZipfFollowsItsLaw) {
  constexpr int32_t kRows = 100'000;
  std::vector<int64_t> counts = count_choices(make_router("zipf:0.6", 64, 1), 64, 1, kRows, true);
  std::sort(counts.rbegin(), counts.rend());
  double sum = 0;
  for (int r = 1; r <= 64; ++r) sum += std::pow(r, -0.6);
  for (const size_t rank : {size_t{0}, size_t{1}, size_t{3}, size_t{9}}) {
    const double expected = kRows * std::pow(static_cast<double>(rank + 1), -0.6) / sum;
    EXPECT_LE(std::abs(static_cast<double>(counts[rank]) - expected), 6 * std::sqrt(expected)) << rank;
  }
}

// The exact draw over what is left has the same law as drawing again: at alpha 4 the eighth expert is seldom found in
// sixteen tries, yet is one of the popular ones.
TEST(RoutingSimulation, SteepZipfStillFavoursThePopular) {
  const std::vector<int64_t> counts = count_choices(make_router("zipf:4", 64, 8), 64, 8, 5000, true);
  std::vector<int64_t> sorted = counts;
  std::sort(sorted.rbegin(), sorted.rend());
  EXPECT_GT(sorted[0], 4990);
  EXPECT_GT(sorted[7], 5 * sorted[20]);
}

TEST(RoutingSimulation, BalancedIsExactOverAPrompt) {
  for (const int64_t count : count_choices(make_router("balanced", 64, 4), 64, 4, 160, true)) EXPECT_EQ(count, 10);
  const double mean = 20'000 * 4.0 / 64;
  for (const int64_t count : count_choices(make_router("balanced", 64, 4), 64, 4, 20'000, false)) {
    EXPECT_LE(std::abs(static_cast<double>(count) - mean), 5 * std::sqrt(4 * mean));
  }
}

struct Loaded {
  std::unique_ptr<kernels::Ops> ops = must_make_ops("auto");
  std::unique_ptr<Model> model;
};

Loaded load_golden(const std::string& name, bool keep_routing, const std::string& simulation) {
  Loaded loaded;
  LoadOptions options = golden_options(golden_path(name), ComputeType::kBf16);
  options.keep_routing = keep_routing;
  options.simulation = parse_routing_simulation(simulation, 3).value();
  loaded.model = must_load(*loaded.ops, options);
  return loaded;
}

const std::vector<TokenId> kTokens{5, 6, 7, 8, 9, 5, 6, 7, 8};

// What the model reports is what it was told to route, and nothing of it changes bits.
TEST(KeptRouting, IsThatOfTheStep) {
  const Loaded simulated = load_golden("ds_base", true, "zipf:0.6");
  const ModelInfo& info = simulated.model->info();
  ASSERT_FALSE(info.moe_layers.empty());
  Sequences sequences(*simulated.ops, *simulated.model, {kTokens});
  sequences.step({{0, 7, true}});
  const SimulatedRouter router(parse_routing_simulation("zipf:0.6", 3).value(), std::ssize(info.moe_layers),
                               info.num_experts, info.experts_per_token);
  const size_t top_k = static_cast<size_t>(info.experts_per_token);
  for (int64_t l = 0; l < std::ssize(info.moe_layers); ++l) {
    const std::span<const int32_t> routed = simulated.model->routed_experts(l);
    ASSERT_EQ(routed.size(), 7 * top_k);
    for (int32_t row = 0; row < 7; ++row) {
      const std::span<const int32_t> experts = routed.subspan(static_cast<size_t>(row) * top_k, top_k);
      EXPECT_EQ(std::vector<int32_t>(experts.begin(), experts.end()),
                choice_of(router, l, {row, kTokens[static_cast<size_t>(row)], true}, top_k));
    }
  }
  sequences.step({{0, 2, false}});
  EXPECT_EQ(simulated.model->routed_experts(0).size(), 2 * top_k);
}

TEST(KeptRouting, ChangesNoLogits) {
  for (const char* name : {"ds_base", "qwen_base"}) {
    const Loaded plain = load_golden(name, false, "");
    const Loaded kept = load_golden(name, true, "");
    Sequences expected(*plain.ops, *plain.model, {kTokens});
    Sequences found(*kept.ops, *kept.model, {kTokens});
    expected.run(0, 6, 4);
    found.run(0, 6, 4);
    EXPECT_EQ(found.logits(0), expected.logits(0)) << name;
    EXPECT_EQ(kept.model->info().fingerprint, plain.model->info().fingerprint);
    EXPECT_TRUE(plain.model->routed_experts(0).empty());
  }
}

TEST(SimulatedRouting, IsAnotherModelToItsPeers) {
  const Loaded plain = load_golden("ds_base", false, "");
  const Loaded uniform = load_golden("ds_base", false, "uniform_random");
  const Loaded balanced = load_golden("ds_base", false, "balanced");
  EXPECT_NE(plain.model->info().fingerprint, uniform.model->info().fingerprint);
  EXPECT_NE(balanced.model->info().fingerprint, uniform.model->info().fingerprint);
}

}  // namespace
}  // namespace tandem::model
