#include "src/base/metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <thread>

namespace tandem {
namespace {

TEST(Metrics, ExposesEveryTypeInTheTextFormat) {
  Registry registry;
  registry.counter("vllm:prompt_tokens_total", "Prompt tokens.", {{"model_name", "m"}, {"engine", "0"}}).add(17);
  registry.gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use.").set(0.25);
  Histogram& latency = registry.histogram("e2e_seconds", "Latency.", std::vector<double>{0.5, 1, 2.5}, {{"h", "a"}});
  latency.observe(0.5);  // a bound is inclusive
  latency.observe(0.75);
  latency.observe(100);
  EXPECT_EQ(registry.expose(),
            "# HELP e2e_seconds Latency.\n"
            "# TYPE e2e_seconds histogram\n"
            "e2e_seconds_bucket{h=\"a\",le=\"0.5\"} 1\n"
            "e2e_seconds_bucket{h=\"a\",le=\"1.0\"} 2\n"
            "e2e_seconds_bucket{h=\"a\",le=\"2.5\"} 2\n"
            "e2e_seconds_bucket{h=\"a\",le=\"+Inf\"} 3\n"
            "e2e_seconds_sum{h=\"a\"} 101.25\n"
            "e2e_seconds_count{h=\"a\"} 3\n"
            "# HELP vllm:kv_cache_usage_perc Share of the KV cache in use.\n"
            "# TYPE vllm:kv_cache_usage_perc gauge\n"
            "vllm:kv_cache_usage_perc 0.25\n"
            "# HELP vllm:prompt_tokens_total Prompt tokens.\n"
            "# TYPE vllm:prompt_tokens_total counter\n"
            "vllm:prompt_tokens_total{model_name=\"m\",engine=\"0\"} 17\n");
}

TEST(Metrics, EscapesHelpAndLabels) {
  Registry registry;
  registry.gauge("g", "a\\b\n\"c\"", {{"path", "C:\\x\n\"y\""}}).set(INFINITY);
  EXPECT_EQ(registry.expose(), "# HELP g a\\\\b\\n\"c\"\n# TYPE g gauge\ng{path=\"C:\\\\x\\n\\\"y\\\"\"} +Inf\n");
}

TEST(Metrics, GivesOneSeriesForEqualLabelsInAnyOrder) {
  Registry registry;
  Counter& first = registry.counter("c_total", "c", {{"a", "1"}, {"b", "2"}});
  EXPECT_EQ(&registry.counter("c_total", "c", {{"b", "2"}, {"a", "1"}}), &first);
  EXPECT_NE(&registry.counter("c_total", "c", {{"a", "1"}, {"b", "3"}}), &first);
}

TEST(Metrics, RefusesConflictingDeclarations) {
  Registry registry;
  registry.counter("c_total", "c");
  EXPECT_DEATH(registry.gauge("c_total", "c"), "CHECK failed");
  EXPECT_DEATH(registry.counter("c_total", "other"), "c vs other");
  EXPECT_DEATH(registry.counter("1c", ""), "CHECK failed");
  EXPECT_DEATH(registry.counter("c_total", "c", {{"a", "1"}, {"a", "2"}}), "CHECK failed");
}

TEST(Metrics, CountsFromSeveralThreads) {
  Registry registry;
  constexpr uint64_t kPerThread = 20'000;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&registry] {
      Counter& counter = registry.counter("c_total", "c");
      Histogram& histogram = registry.histogram("h", "h", inter_token_buckets());
      Gauge& gauge = registry.gauge("g", "g");
      for (uint64_t k = 0; k < kPerThread; ++k) {
        counter.add();
        histogram.observe(1);
        gauge.add(1);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(registry.counter("c_total", "c").value(), 4 * kPerThread);
  EXPECT_EQ(registry.histogram("h", "h", inter_token_buckets()).count(), 4 * kPerThread);
  EXPECT_EQ(registry.histogram("h", "h", inter_token_buckets()).sum(), 4.0 * kPerThread);
  EXPECT_EQ(registry.gauge("g", "g").value(), 4.0 * kPerThread);
}

TEST(Metrics, MakesBuckets) {
  EXPECT_EQ(one_two_five_buckets(100), (std::vector<double>{1, 2, 5, 10, 20, 50, 100}));
  EXPECT_EQ(one_two_five_buckets(49), (std::vector<double>{1, 2, 5, 10, 20}));
  EXPECT_EQ(linear_buckets(2, 0.5, 3), (std::vector<double>{2, 2.5, 3}));
  EXPECT_EQ(time_to_first_token_buckets().size(), 22U);
  EXPECT_EQ(inter_token_buckets().size(), 19U);
  EXPECT_EQ(request_latency_buckets().size(), 21U);
}

}  // namespace
}  // namespace tandem
