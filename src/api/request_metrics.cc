#include "src/api/request_metrics.h"

#include <algorithm>
#include <array>

namespace tandem::api {
namespace {

MetricLabels labels_of(const std::string& model_name) { return {{"model_name", model_name}, {"engine", "0"}}; }

Counter& ended_counter(Registry& registry, const std::string& model_name, std::string reason) {
  MetricLabels labels = labels_of(model_name);
  labels.emplace_back("finished_reason", std::move(reason));
  return registry.counter("vllm:request_success_total", "Requests that ended, by the reason.", labels);
}

}  // namespace

RequestMetrics::RequestMetrics(Registry& registry, const std::string& model_name, int64_t max_model_len)
    : params_n_(
          registry.histogram("vllm:request_params_n", "The parameter n.", request_n_buckets(), labels_of(model_name))),
      params_max_tokens_(registry.histogram("vllm:request_params_max_tokens", "The parameter max_tokens.",
                                            one_two_five_buckets(static_cast<double>(max_model_len)),
                                            labels_of(model_name))),
      first_token_seconds_(registry.histogram("vllm:time_to_first_token_seconds",
                                              "From a request's arrival to its first token.",
                                              time_to_first_token_buckets(), labels_of(model_name))),
      inter_token_seconds_(registry.histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.",
                                              inter_token_buckets(), labels_of(model_name))),
      token_seconds_(registry.histogram("vllm:request_time_per_output_token_seconds",
                                        "A request's mean time per token after its first.", inter_token_buckets(),
                                        labels_of(model_name))),
      e2e_seconds_(registry.histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its last token.",
                                      request_latency_buckets(), labels_of(model_name))),
      prompt_tokens_(registry.histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.",
                                        one_two_five_buckets(static_cast<double>(max_model_len)),
                                        labels_of(model_name))),
      generation_tokens_(registry.histogram("vllm:request_generation_tokens", "Generated tokens of a request.",
                                            one_two_five_buckets(static_cast<double>(max_model_len)),
                                            labels_of(model_name))),
      max_generation_tokens_(registry.histogram(
          "vllm:request_max_num_generation_tokens", "Generated tokens of the longest choice of a request.",
          one_two_five_buckets(static_cast<double>(max_model_len)), labels_of(model_name))),
      stop_(ended_counter(registry, model_name, "stop")),
      length_(ended_counter(registry, model_name, "length")),
      abort_(ended_counter(registry, model_name, "abort")),
      error_(ended_counter(registry, model_name, "error")) {}

void RequestMetrics::ended(std::string_view reason, double seconds, double decode_seconds, int64_t prompt_tokens,
                           int64_t tokens) {
  Counter& counter = reason == "stop" ? stop_ : reason == "length" ? length_ : reason == "abort" ? abort_ : error_;
  counter.add();
  e2e_seconds_.observe(seconds);
  prompt_tokens_.observe(static_cast<double>(prompt_tokens));
  generation_tokens_.observe(static_cast<double>(tokens));
  if (tokens > 1) token_seconds_.observe(decode_seconds / static_cast<double>(tokens - 1));
}

void HttpMetrics::count(const HttpRecord& record) {
  static constexpr std::array<std::string_view, 5> kPolled = {"/metrics", "/health", "/load", "/ping", "/version"};
  if (std::find(kPolled.begin(), kPolled.end(), record.route) != kPolled.end()) return;
  Series& series = find(record);
  series.requests->add();
  series.seconds->observe(record.seconds);
}

HttpMetrics::Series& HttpMetrics::find(const HttpRecord& record) {
  const int status_kind = record.status / 100;
  for (Series& series : series_) {
    if (series.status_kind == status_kind && series.route == record.route && series.method == record.method) {
      return series;
    }
  }
  static constexpr std::array kSeconds = {0.1, 0.5, 1.0};
  const std::string handler(record.route);
  const std::string method(record.method);
  // Grouped as "2xx", as the instrumentation of vLLM's server does.
  Counter& requests =
      registry_.counter("http_requests_total", "HTTP requests by route, method and kind of status.",
                        {{"handler", handler}, {"method", method}, {"status", fmt::format("{}xx", status_kind)}});
  Histogram& seconds =
      registry_.histogram("http_request_duration_seconds", "From a request's head to the end of its answer.", kSeconds,
                          {{"handler", handler}, {"method", method}});
  return series_.emplace_back(Series{handler, method, status_kind, &requests, &seconds});
}

}  // namespace tandem::api
