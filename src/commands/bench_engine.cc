// tandem bench throughput, tandem bench latency: the engine without HTTP.
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "src/base/log.h"
#include "src/bench/engine_load.h"
#include "src/commands/client_common.h"
#include "src/commands/commands.h"
#include "src/commands/rank.h"
#include "src/kernels/bench/limits.h"

namespace tandem::commands {
namespace {

struct LoadedRank {
  model::MoeConfig moe;
  std::unique_ptr<Rank> rank;
};

// A rank that is running, without server and tokenizer.
Result<LoadedRank> start_rank(const Options& options, const Clock& clock, Registry& registry) {
  TANDEM_ASSIGN(RankConfig config, make_rank_config(options));
  config.model_name = "bench";
  const int64_t vocab_size = config.model.vocab_size;
  const model::MoeConfig moe = config.model.moe;
  TANDEM_ASSIGN(std::unique_ptr<Rank> rank, Rank::load(std::move(config), vocab_size, clock, registry, nullptr));
  rank->engine().start();
  return LoadedRank{moe, std::move(rank)};
}

Result<std::vector<bench::PromptRequest>> make_prompts(const Options& options, const Rank& rank, int64_t count,
                                                       uint64_t seed) {
  const int64_t input_len = options.integer("input-len");
  const int64_t output_len = options.integer("output-len");
  if (input_len + output_len > rank.info().max_model_len) {
    return invalid_argument("input-len", "--input-len {} and --output-len {} together exceed --max-model-len {}",
                            input_len, output_len, rank.info().max_model_len);
  }
  return bench::make_random_prompts({.num_prompts = count,
                                     .input_len = input_len,
                                     .output_len = output_len,
                                     .vocab_size = rank.info().vocab_size,
                                     .seed = seed});
}

Status check_all_succeeded(const bench::EngineRun& run) {
  for (const bench::RequestRecord& record : run.records) {
    if (!record.success) return make_error(ErrorKind::kInternal, "a request failed: {}", record.error);
  }
  return {};
}

Status save_json(const std::string& path, const nlohmann::json& json) {
  if (path.empty()) return {};
  std::ofstream file(path);
  file << json.dump(2) << "\n";
  file.close();
  if (!file) return make_error(ErrorKind::kUnavailable, "{}: cannot be written; check --output-json", path);
  std::printf("result in %s\n", path.c_str());
  return {};
}

Status measure_throughput(const Options& options) {
  const SteadyClock clock;
  Registry registry;
  TANDEM_ASSIGN(const LoadedRank loaded, start_rank(options, clock, registry));
  TANDEM_ASSIGN(const std::vector<bench::PromptRequest> prompts,
                make_prompts(options, *loaded.rank, options.integer("num-prompts"),
                             static_cast<uint64_t>(options.integer("seed"))));
  const bench::EngineRun run = bench::run_on_worker(loaded.rank->engine(), prompts, clock);
  TANDEM_TRY(check_all_succeeded(run));
  const bench::ReportOptions shown{{"ttft", "tpot", "e2el"}, {50, 90, 99}};
  const bench::Report report = bench::make_report(run.records, run.duration, shown);
  std::printf("%s, %d threads: %.2f requests/s, %.1f tokens/s, %.1f output tokens/s\n",
              std::string(loaded.rank->ops().name()).c_str(), loaded.rank->ops().num_threads(),
              report.request_throughput, report.total_token_throughput, report.output_throughput);
  std::fputs(bench::report_as_text(report, shown).c_str(), stdout);
  return save_json(options.text("output-json"),
                   {{"elapsed_time", run.duration},
                    {"num_requests", prompts.size()},
                    {"total_num_tokens", report.total_input_tokens + report.total_output_tokens},
                    {"requests_per_second", report.request_throughput},
                    {"tokens_per_second", report.total_token_throughput},
                    {"output_tokens_per_second", report.output_throughput}});
}

// What the iterations of a latency measurement gave, in seconds.
struct LatencySamples {
  std::vector<double> latencies;  // of whole batches
  std::vector<double> prompts;    // until every request of the batch has its first token
  std::vector<double> steps;      // of decode
  std::vector<double> limits;     // 1e9 bytes per second that memory gave, the mean of before and after each batch
};

void add_samples(const bench::EngineRun& run, LatencySamples& samples) {
  samples.latencies.push_back(run.duration);
  double last_first = 0;
  double last_end = 0;
  int64_t steps = 0;
  for (const bench::RequestRecord& record : run.records) {
    last_first = std::max(last_first, record.start + record.ttft);
    last_end = std::max(last_end, record.start + record.latency);
    steps = std::max(steps, record.output_len - 1);
  }
  samples.prompts.push_back(last_first);
  if (steps > 0) samples.steps.push_back((last_end - last_first) / static_cast<double>(steps));
}

Result<LatencySamples> take_samples(const Options& options, Rank& rank, const Clock& clock) {
  const int64_t warmups = options.integer("num-iters-warmup");
  LatencySamples samples;
  kernels::LimitMeter meter(rank.ops().name(), rank.ops().num_threads());
  for (int64_t i = 0; i < warmups + options.integer("num-iters"); ++i) {
    // New prompts each time: none is found in the prefix cache.
    TANDEM_ASSIGN(
        const std::vector<bench::PromptRequest> prompts,
        make_prompts(options, rank, options.integer("batch-size"), static_cast<uint64_t>(options.integer("seed") + i)));
    const double limit_before = meter.sample_read_gbytes();
    const bench::EngineRun run = bench::run_on_worker(rank.engine(), prompts, clock);
    TANDEM_TRY(check_all_succeeded(run));
    const double limit_after = meter.sample_read_gbytes();
    if (i < warmups) continue;
    add_samples(run, samples);
    samples.limits.push_back((limit_before + limit_after) / 2);
  }
  return samples;
}

// Bytes that a decode step in the middle of the answers must read: weights, and the keys and values of its streams.
double decode_step_bytes(const Options& options, const LoadedRank& loaded) {
  const model::ModelInfo& info = loaded.rank->info();
  const double rows = static_cast<double>(options.integer("batch-size"));
  const bench::WeightTraffic weights{.weight_bytes = static_cast<double>(info.weight_bytes),
                                     .expert_bytes = static_cast<double>(info.expert_bytes),
                                     .lookup_bytes = static_cast<double>(info.lookup_bytes),
                                     .num_experts = static_cast<double>(std::max<int64_t>(1, loaded.moe.num_experts)),
                                     .top_k = static_cast<double>(loaded.moe.router.top_k)};
  const double context = static_cast<double>(options.integer("input-len") + options.integer("output-len") / 2);
  return weights.bytes_per_step(rows) +
         rows * context * static_cast<double>(info.kv.bytes_per_token * info.kv.num_layers);
}

Status measure_latency(const Options& options) {
  const SteadyClock clock;
  Registry registry;
  TANDEM_ASSIGN(const LoadedRank loaded, start_rank(options, clock, registry));
  const int64_t batch_size = options.integer("batch-size");
  const int64_t max_num_seqs = options.integer("max-num-seqs");
  if (batch_size > max_num_seqs) {
    return invalid_argument("batch-size", "--batch-size {} exceeds --max-num-seqs {}", batch_size, max_num_seqs);
  }
  TANDEM_ASSIGN(const LatencySamples samples, take_samples(options, *loaded.rank, clock));
  const std::vector<double> shown{10, 25, 50, 75, 90, 99};
  const bench::Distribution latency = bench::describe_values(samples.latencies, shown);
  nlohmann::json percentiles;
  std::printf("%s, %d threads, batch of %lld: average latency %.4f s\n", std::string(loaded.rank->ops().name()).c_str(),
              loaded.rank->ops().num_threads(), static_cast<long long>(batch_size), latency.mean);
  for (const auto& [percentile, value] : latency.percentiles) {
    std::printf("  %2.0f %% of batches within %.4f s\n", percentile, value);
    percentiles[fmt::format("{:.0f}", percentile)] = value;
  }
  const double rows = static_cast<double>(batch_size);
  const double prompt_s = bench::describe_values(samples.prompts, {}).median;
  const double prompt_rate = rows * static_cast<double>(options.integer("input-len")) / prompt_s;
  std::printf("prompts: %.4f s, %.1f tokens/s\n", prompt_s, prompt_rate);
  nlohmann::json json{{"avg_latency", latency.mean},
                      {"latencies", samples.latencies},
                      {"percentiles", percentiles},
                      {"prompt_tokens_per_second", prompt_rate}};
  if (!samples.steps.empty()) {
    const double step_s = bench::describe_values(samples.steps, {}).median;
    const double bytes = decode_step_bytes(options, loaded);
    const double gbytes = bytes / step_s * 1e-9;
    const double limit = bench::describe_values(samples.limits, {}).median;
    std::vector<double> shares;
    for (size_t i = 0; i < samples.steps.size(); ++i)
      shares.push_back(bytes / samples.steps[i] * 1e-9 / samples.limits[i]);
    const double share = bench::describe_values(shares, {}).median;
    std::printf("decode: %.3f ms a step, %.1f tokens/s; reads %.1f MB a step (experts evenly chosen) = %.1f GB/s, ",
                step_s * 1e3, rows / step_s, gbytes * step_s * 1e3, gbytes);
    std::printf("%.0f %% of the %.1f GB/s measured before and after\n", 100 * share, limit);
    json.update({{"decode_step_seconds", step_s},
                 {"decode_tokens_per_second", rows / step_s},
                 {"decode_read_gbytes_per_second", gbytes},
                 {"measured_read_gbytes_per_second", limit},
                 {"decode_share_of_read_limit", share}});
  }
  return save_json(options.text("output-json"), json);
}

}  // namespace

int run_bench_throughput(const Options& options) {
  const Status status = measure_throughput(options);
  return status.ok() ? 0 : fail_with(status.error());
}

int run_bench_latency(const Options& options) {
  const Status status = measure_latency(options);
  return status.ok() ? 0 : fail_with(status.error());
}

}  // namespace tandem::commands
