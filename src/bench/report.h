// What a benchmark measured, under the names of `vllm bench serve` so that its readers read ours. Pure.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/base/result.h"

namespace tandem::bench {

// One request. Times in seconds from the start of the measurement.
struct RequestRecord {
  bool success = false;
  std::string error;  // of a failure
  int64_t input_len = 0;
  int64_t output_len = 0;
  double start = 0;
  double ttft = 0;           // from start to the first token
  double latency = 0;        // from start to the end
  std::vector<double> itls;  // between chunks with tokens
};

struct ReportOptions {
  std::vector<std::string> metrics;  // of ttft, tpot, itl, e2el
  std::vector<double> percentiles;   // 0 … 100
};
// "ttft,itl" and "50,99.9"; an unknown name or a number out of range is an error.
Result<ReportOptions> parse_report_options(const std::string& metrics, const std::string& percentiles);

struct Distribution {
  double mean = 0;
  double median = 0;
  double std = 0;  // of the population
  std::map<double, double> percentiles;
};
// Percentiles interpolate linearly between the two nearest values, as numpy does. Empty values give zeros.
Distribution describe_values(std::vector<double> values, const std::vector<double>& percentiles);

struct Report {
  double duration = 0;
  int64_t completed = 0;
  int64_t failed = 0;
  int64_t total_input_tokens = 0;
  int64_t total_output_tokens = 0;
  double request_throughput = 0;
  double output_throughput = 0;
  double total_token_throughput = 0;
  double max_output_tokens_per_s = 0;  // in the best second
  int64_t max_concurrent_requests = 0;
  std::map<std::string, Distribution> latencies_ms;  // by metric
  std::map<std::string, int64_t> errors;             // message to count
};

Report make_report(const std::vector<RequestRecord>& records, double duration, const ReportOptions& options);

// vLLM's fields: duration, completed, …, mean_ttft_ms, p99_itl_ms. With `detailed` also one list per request quantity.
std::string report_as_json(const Report& report, const std::vector<RequestRecord>& records,
                           const std::map<std::string, std::string>& header_json, bool detailed);
std::string report_as_text(const Report& report, const ReportOptions& options);

}  // namespace tandem::bench
