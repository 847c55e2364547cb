// tandem bench serve: load on a server, and what it did with it.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "src/bench/load_generator.h"
#include "src/commands/client_common.h"
#include "src/commands/commands.h"

namespace tandem::commands {
namespace {

struct Run {
  bench::LoadOptions load;
  bench::ReportOptions report;
  std::vector<bench::PromptRequest> prompts;
};

Result<int64_t> find_vocab_size(const Options& options, const api::HttpUrl& url) {
  if (options.integer("vocab-size") > 0) return options.integer("vocab-size");
  const Result<std::string> body = get_text(url, "/tandem/v1/text_bundle", options.text("api-key"));
  if (body.ok()) {
    const nlohmann::json bundle = nlohmann::json::parse(*body, nullptr, /*allow_exceptions=*/false);
    if (bundle.is_object() && bundle.contains("vocab_size") && bundle["vocab_size"].is_number_integer()) {
      return bundle["vocab_size"].get<int64_t>();
    }
  }
  return invalid_argument("vocab-size", "{} does not tell its vocabulary size ({}); give --vocab-size", url.origin(),
                          body.ok() ? "no vocab_size" : body.error().message);
}

Result<std::vector<bench::PromptRequest>> make_prompts(const Options& options, const api::HttpUrl& url, bool chat) {
  const std::string& name = options.text("dataset-name");
  bench::DatasetOptions dataset{.num_prompts = options.integer("num-prompts") + options.integer("num-warmups"),
                                .input_len = options.integer("random-input-len"),
                                .output_len = options.integer("random-output-len"),
                                .prefix_len = options.integer("random-prefix-len"),
                                .range_ratio = options.number("random-range-ratio"),
                                .vocab_size = 0,
                                .seed = static_cast<uint64_t>(options.integer("seed"))};
  if (name == "text") return bench::make_text_prompts(dataset);
  if (name == "custom") return bench::load_custom_prompts(options.text("dataset-path"), dataset);
  if (chat) {
    return invalid_argument("dataset-name",
                            "random prompts are token ids, which the chat endpoint does not take; use "
                            "--dataset-name text");
  }
  TANDEM_ASSIGN(dataset.vocab_size, find_vocab_size(options, url));
  return bench::make_random_prompts(dataset);
}

Result<Run> prepare_run(const Options& options) {
  Run run;
  TANDEM_ASSIGN(run.load.url, api::parse_http_url(options.text("base-url")));
  run.load.chat = options.text("endpoint").find("chat") != std::string::npos;
  run.load.api_key = options.text("api-key");
  TANDEM_ASSIGN(run.load.model, resolve_model_name(run.load.url, run.load.api_key, options.text("model")));
  run.load.temperature = options.number("temperature");
  run.load.ignore_eos = options.flag("ignore-eos");
  run.load.request_rate = options.number("request-rate");
  run.load.max_concurrency = options.integer("max-concurrency");
  run.load.seed = static_cast<uint64_t>(options.integer("seed"));
  run.load.request_timeout =
      std::chrono::milliseconds(static_cast<int64_t>(options.number("request-timeout-s") * 1000));
  TANDEM_ASSIGN(run.report,
                bench::parse_report_options(options.text("percentile-metrics"), options.text("metric-percentiles")));
  TANDEM_ASSIGN(run.prompts, make_prompts(options, run.load.url, run.load.chat));
  for (const bench::PromptRequest& prompt : run.prompts) {
    if (run.load.chat && !std::holds_alternative<std::string>(prompt.prompt)) {
      return invalid_argument("dataset-path", "the chat endpoint takes prompts as text, not as token ids");
    }
  }
  return run;
}

void show_progress(int64_t ended, int64_t total) {
  constexpr int64_t kWidth = 30;
  const int64_t filled = kWidth * ended / total;
  std::fprintf(stderr, "\r[%s%s] %lld/%lld%s", std::string(static_cast<size_t>(filled), '#').c_str(),
               std::string(static_cast<size_t>(kWidth - filled), '.').c_str(), static_cast<long long>(ended),
               static_cast<long long>(total), ended == total ? "\n" : "");
  std::fflush(stderr);
}

std::string date_text() {
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  ::localtime_r(&now, &local);
  char text[32];
  std::strftime(text, sizeof text, "%Y%m%d-%H%M%S", &local);
  return text;
}

std::string rate_text(double rate) { return std::isinf(rate) ? "inf" : fmt::format("{}", rate); }

std::map<std::string, std::string> result_header(const Options& options, const Run& run, const std::string& date) {
  const auto as_json = [](const auto& value) {
    return nlohmann::json(value).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  };
  const int64_t concurrency = run.load.max_concurrency;
  const double rate = run.load.request_rate;
  const std::string& label = options.text("label");
  return {{"date", as_json(date)},
          {"endpoint_type", as_json(run.load.chat ? "openai-chat" : "openai")},
          {"backend", as_json(run.load.chat ? "openai-chat" : "openai")},
          {"label", label.empty() ? "null" : as_json(label)},
          {"model_id", as_json(run.load.model)},
          {"tokenizer_id", as_json(run.load.model)},
          {"num_prompts", as_json(options.integer("num-prompts"))},
          {"request_rate", std::isinf(rate) ? as_json("inf") : as_json(rate)},
          {"burstiness", "1.0"},
          {"max_concurrency", concurrency > 0 ? as_json(concurrency) : "null"}};
}

Status save_result(const Options& options, const Run& run, const std::string& date, const std::string& json) {
  std::string name = options.text("result-filename");
  if (name.empty()) {
    const std::string concurrency =
        run.load.max_concurrency > 0 ? fmt::format("-concurrency{}", run.load.max_concurrency) : "";
    const std::string model = std::filesystem::path(run.load.model).filename().string();
    name = fmt::format("openai-{}qps{}-{}-{}.json", rate_text(run.load.request_rate), concurrency, model, date);
  }
  const std::filesystem::path path = std::filesystem::path(options.text("result-dir")) / name;
  std::ofstream file(path);
  file << json;
  file.close();
  if (!file) return make_error(ErrorKind::kUnavailable, "{}: cannot be written; check --result-dir", path.string());
  std::printf("result in %s\n", path.c_str());
  return {};
}

}  // namespace

int run_bench_serve(const Options& options) {
  Result<Run> run = prepare_run(options);
  if (!run.ok()) return fail_with(run.error());
  const auto num_warmups = static_cast<std::ptrdiff_t>(options.integer("num-warmups"));
  if (num_warmups > 0) {
    const std::vector<bench::PromptRequest> warmups(run->prompts.begin(), run->prompts.begin() + num_warmups);
    run->prompts.erase(run->prompts.begin(), run->prompts.begin() + num_warmups);
    bench::LoadOptions quiet = run->load;
    quiet.request_rate = INFINITY;
    const bench::LoadResult warm = bench::run_load(warmups, quiet);
    if (!warm.records.front().success) {
      return fail_with(
          make_error(ErrorKind::kUnavailable, "the first warm-up request failed: {}", warm.records.front().error));
    }
  }
  if (::isatty(STDERR_FILENO) == 1) run->load.on_progress = show_progress;
  const std::string date = date_text();
  const bench::LoadResult result = bench::run_load(run->prompts, run->load);
  const bench::Report report = bench::make_report(result.records, result.duration, run->report);
  std::printf("%s at %s, rate %s, concurrency %s\n", run->load.model.c_str(), run->load.url.origin().c_str(),
              rate_text(run->load.request_rate).c_str(),
              run->load.max_concurrency > 0 ? std::to_string(run->load.max_concurrency).c_str() : "unbounded");
  std::fputs(bench::report_as_text(report, run->report).c_str(), stdout);
  if (options.flag("save-result") || !options.text("result-filename").empty()) {
    const std::string json = bench::report_as_json(report, result.records, result_header(options, *run, date),
                                                   options.flag("save-detailed"));
    if (const Status saved = save_result(options, *run, date, json); !saved.ok()) return fail_with(saved.error());
  }
  return report.failed == 0 ? 0 : 1;
}

}  // namespace tandem::commands
