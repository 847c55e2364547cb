// tandem bench kernels: every kernel beside the limits of this machine.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <random>

#include "src/commands/client_common.h"
#include "src/commands/commands.h"
#include "src/engine/sampler.h"
#include "src/kernels/bench/kernels_bench.h"

namespace tandem::commands {
namespace {

struct SamplingLine {
  const char* name;
  double temperature;
  int64_t top_k;
  double top_p;
};
constexpr SamplingLine kSamplingLines[] = {
    {"greedy", 0, 0, 1}, {"temperature", 1, 0, 1}, {"top_k=50", 1, 50, 1}, {"top_k=20,top_p=0.95", 1, 20, 0.95}};

// The sampler is no kernel of a device and uses one thread, so the limit of its lines is that of one.
void bench_sampling(const std::string& filter, kernels::KernelsBenchNames& names) {
  constexpr int64_t kCalls = 20;
  std::unique_ptr<kernels::LimitMeter> meter;
  for (const size_t vocabulary : {32'000U, 152'000U}) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0.0F, 2.0F);
    std::vector<float> logits(vocabulary);
    for (float& logit : logits) logit = normal(random);
    const std::vector<TokenId> tokens(100, 1);
    for (const SamplingLine& line : kSamplingLines) {
      engine::SamplingParams params;
      params.temperature = line.temperature;
      params.top_k = line.top_k;
      params.top_p = line.top_p;
      const kernels::BenchWork work{
          .name = fmt::format("sample {} V={}", line.name, vocabulary),
          .calls = kCalls,
          .bytes = static_cast<double>(kCalls) * static_cast<double>(vocabulary) * sizeof(float)};
      names.all.push_back(work.name);
      if (work.name.find(filter) == std::string::npos) continue;
      names.has_selected = true;
      if (meter == nullptr) meter = std::make_unique<kernels::LimitMeter>("auto", 1);
      const kernels::Rates rates = measure_beside_limits(
          *meter,
          [&] {
            for (int64_t call = 0; call < kCalls; ++call) {
              CHECK(engine::sample_token({logits, tokens, 50, {}}, params).ok());
            }
          },
          work.ops, work.bytes, false);
      print_bench_line(work, rates, "one thread");
    }
  }
}

}  // namespace

int run_bench_kernels(const Options& options) {
  const std::string& isa = options.text("cpu-isa");
  const kernels::KernelsBenchOptions bench{.isa = isa == "all" || isa == "auto" ? isa : "cpu-" + isa,
                                           .threads = static_cast<int>(options.integer("threads")),
                                           .filter = options.text("filter")};
  Result<kernels::KernelsBenchNames> names = kernels::run_kernels_bench(bench);
  if (!names.ok()) return fail_with(names.error());
  bench_sampling(bench.filter, *names);
  if (names->has_selected) return 0;
  return fail_with(invalid_argument("filter", "--filter '{}' is in no line's name; the lines are:\n  {}", bench.filter,
                                    fmt::join(names->all, "\n  ")));
}

}  // namespace tandem::commands
