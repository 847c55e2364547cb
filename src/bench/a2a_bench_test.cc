#include "src/bench/a2a_bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tandem::bench {
namespace {

class A2aBench : public testing::TestWithParam<A2aOver> {};

INSTANTIATE_TEST_SUITE_P(Over, A2aBench, testing::Values(A2aOver::kSharedMemory, A2aOver::kTcp),
                         [](const auto& over) { return std::string(a2a_over_name(over.param)); });

// Real processes; the ranks themselves check what comes back.
TEST_P(A2aBench, MeasuresEveryBackend) {
  A2aBenchOptions options;
  options.hidden = 64;
  options.top_k = 2;
  options.num_experts = 6;
  options.seconds = 0.01;
  const std::unique_ptr<kernels::Ops> ops = kernels::make_ops("auto", 1).value();
  for (const ep::All2All backend :
       {ep::All2All::kNaive, ep::All2All::kAllGather, ep::All2All::kHighThroughput, ep::All2All::kLowLatency}) {
    for (const int64_t tokens : {1, 9}) {
      const Result<A2aLine> line = measure_a2a(options, GetParam(), backend, 3, tokens);
      ASSERT_TRUE(line.ok()) << line.error().message;
      EXPECT_GE(line->rounds, 1);
      EXPECT_GT(line->dispatch.us, 0);
      EXPECT_GT(line->combine.us, 0);
      EXPECT_GT(line->dispatch.plain_us, 0);
      EXPECT_GT(line->combine.plain_us, 0);
      // Two outputs of 64 floats for each row, of which some stay at home.
      EXPECT_LE(line->combine.bytes, static_cast<double>(tokens * 2 * 64 * 4));
      const bool sends_all = backend == ep::All2All::kNaive || backend == ep::All2All::kAllGather;
      const model::ExchangeShape shape{.max_rows = tokens,
                                       .hidden = options.hidden,
                                       .top_k = options.top_k,
                                       .num_experts = options.num_experts,
                                       .formats = {options.weights}};
      const ep::WindowPlan plan = ep::plan_window({.backend = backend}, *ops, shape, 3);
      const double to_all = static_cast<double>(tokens * 2 * plan.record_bytes);
      EXPECT_LE(line->dispatch.bytes, to_all);
      if (sends_all) {
        EXPECT_EQ(line->dispatch.bytes, to_all);
      }
      EXPECT_THAT(a2a_line_as_text(*line), testing::HasSubstr(ep::all2all_name(backend)));
      EXPECT_THAT(a2a_line_as_text(*line), testing::HasSubstr(a2a_over_name(GetParam())));
    }
  }
}

}  // namespace
}  // namespace tandem::bench
