#include "src/bench/report.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

namespace tandem::bench {
namespace {

constexpr const char* kMetrics[] = {"ttft", "tpot", "itl", "e2el"};

const char* metric_title(const std::string& metric) {
  if (metric == "ttft") return "time to first token";
  if (metric == "tpot") return "time per output token";
  if (metric == "itl") return "between tokens";
  return "end to end";
}

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    if (end > begin) parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

// "p99", "p99.9": as vLLM names them.
std::string percentile_name(double percentile) { return fmt::format("p{}", percentile); }

std::vector<double> values_of(const std::string& metric, const std::vector<RequestRecord>& records) {
  std::vector<double> values;
  for (const RequestRecord& record : records) {
    if (!record.success) continue;
    if (metric == "ttft") values.push_back(record.ttft * 1e3);
    if (metric == "e2el") values.push_back(record.latency * 1e3);
    if (metric == "tpot" && record.output_len > 1) {
      values.push_back((record.latency - record.ttft) * 1e3 / static_cast<double>(record.output_len - 1));
    }
    if (metric == "itl") {
      for (const double gap : record.itls) values.push_back(gap * 1e3);
    }
  }
  return values;
}

// Tokens per whole second of the run. A chunk's tokens are spread evenly over the request's chunks.
double best_second(const std::vector<RequestRecord>& records, double duration) {
  std::vector<double> tokens(static_cast<size_t>(std::ceil(std::max(duration, 1.0))) + 1, 0.0);
  const auto add = [&](double time, double count) {
    const size_t second = static_cast<size_t>(std::max(time, 0.0));
    tokens[std::min(second, tokens.size() - 1)] += count;
  };
  for (const RequestRecord& record : records) {
    if (!record.success || record.output_len == 0) continue;
    const double per_chunk = static_cast<double>(record.output_len) / static_cast<double>(record.itls.size() + 1);
    double time = record.start + record.ttft;
    add(time, per_chunk);
    for (const double gap : record.itls) add(time += gap, per_chunk);
  }
  return *std::max_element(tokens.begin(), tokens.end());
}

int64_t most_at_once(const std::vector<RequestRecord>& records) {
  std::vector<std::pair<double, int>> changes;  // ends sort before starts of the same moment
  for (const RequestRecord& record : records) {
    changes.emplace_back(record.start, +1);
    changes.emplace_back(record.start + record.latency, -1);
  }
  std::sort(changes.begin(), changes.end());
  int64_t now = 0, most = 0;
  for (const auto& [time, change] : changes) most = std::max(most, now += change);
  return most;
}

}  // namespace

Result<ReportOptions> parse_report_options(const std::string& metrics, const std::string& percentiles) {
  ReportOptions options;
  for (std::string& name : split_list(metrics)) {
    if (std::find(std::begin(kMetrics), std::end(kMetrics), name) == std::end(kMetrics)) {
      return invalid_argument("percentile-metrics", "--percentile-metrics names '{}'; it takes ttft, tpot, itl, e2el",
                              name);
    }
    options.metrics.push_back(std::move(name));
  }
  for (const std::string& text : split_list(percentiles)) {
    double value = -1;
    const std::from_chars_result parsed = std::from_chars(text.data(), text.data() + text.size(), value);
    if (parsed.ec != std::errc() || parsed.ptr != text.data() + text.size() || !(value >= 0 && value <= 100)) {
      return invalid_argument("metric-percentiles", "--metric-percentiles has '{}'; it takes numbers from 0 to 100",
                              text);
    }
    options.percentiles.push_back(value);
  }
  return options;
}

Distribution describe_values(std::vector<double> values, const std::vector<double>& percentiles) {
  Distribution out;
  for (const double percentile : percentiles) out.percentiles[percentile] = 0;
  if (values.empty()) return out;
  std::sort(values.begin(), values.end());
  const double count = static_cast<double>(values.size());
  const auto at = [&](double percentile) {
    const double rank = percentile / 100 * (count - 1);
    const size_t below = static_cast<size_t>(rank);
    const size_t above = std::min(below + 1, values.size() - 1);
    return values[below] + (values[above] - values[below]) * (rank - static_cast<double>(below));
  };
  out.mean = std::accumulate(values.begin(), values.end(), 0.0) / count;
  out.median = at(50);
  double squares = 0;
  for (const double value : values) squares += (value - out.mean) * (value - out.mean);
  out.std = std::sqrt(squares / count);
  for (auto& [percentile, value] : out.percentiles) value = at(percentile);
  return out;
}

Report make_report(const std::vector<RequestRecord>& records, double duration, const ReportOptions& options) {
  Report report;
  report.duration = duration;
  for (const RequestRecord& record : records) {
    if (!record.success) {
      ++report.failed;
      ++report.errors[record.error];
      continue;
    }
    ++report.completed;
    report.total_input_tokens += record.input_len;
    report.total_output_tokens += record.output_len;
  }
  const double seconds = std::max(duration, 1e-9);
  report.request_throughput = static_cast<double>(report.completed) / seconds;
  report.output_throughput = static_cast<double>(report.total_output_tokens) / seconds;
  report.total_token_throughput = static_cast<double>(report.total_input_tokens + report.total_output_tokens) / seconds;
  report.max_output_tokens_per_s = best_second(records, duration);
  report.max_concurrent_requests = most_at_once(records);
  for (const std::string& metric : options.metrics) {
    report.latencies_ms[metric] = describe_values(values_of(metric, records), options.percentiles);
  }
  return report;
}

std::string report_as_json(const Report& report, const std::vector<RequestRecord>& records,
                           const std::map<std::string, std::string>& header_json, bool detailed) {
  nlohmann::ordered_json out;
  for (const auto& [key, value] : header_json) out[key] = nlohmann::json::parse(value);
  out["duration"] = report.duration;
  out["completed"] = report.completed;
  out["failed"] = report.failed;
  out["total_input_tokens"] = report.total_input_tokens;
  out["total_output_tokens"] = report.total_output_tokens;
  out["request_throughput"] = report.request_throughput;
  out["request_goodput"] = nullptr;  // no service level is given
  out["output_throughput"] = report.output_throughput;
  out["total_token_throughput"] = report.total_token_throughput;
  out["max_output_tokens_per_s"] = report.max_output_tokens_per_s;
  out["max_concurrent_requests"] = report.max_concurrent_requests;
  for (const auto& [metric, values] : report.latencies_ms) {
    out[fmt::format("mean_{}_ms", metric)] = values.mean;
    out[fmt::format("median_{}_ms", metric)] = values.median;
    out[fmt::format("std_{}_ms", metric)] = values.std;
    for (const auto& [percentile, value] : values.percentiles) {
      out[fmt::format("{}_{}_ms", percentile_name(percentile), metric)] = value;
    }
  }
  if (detailed) {
    for (const char* key : {"input_lens", "output_lens", "ttfts", "itls", "start_times", "errors"}) {
      out[key] = nlohmann::json::array();
    }
    for (const RequestRecord& record : records) {
      out["input_lens"].push_back(record.input_len);
      out["output_lens"].push_back(record.output_len);
      out["ttfts"].push_back(record.ttft);
      out["itls"].push_back(record.itls);
      out["start_times"].push_back(record.start);
      out["errors"].push_back(record.error);
    }
  }
  return out.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string report_as_text(const Report& report, const ReportOptions& options) {
  std::string out = fmt::format(
      "requests    {} completed, {} failed in {:.2f} s: {:.2f} per second, at most {} at once\n"
      "tokens      {} in, {} out: {:.1f} out/s (best second {:.0f}), {:.1f} in and out/s\n\n",
      report.completed, report.failed, report.duration, report.request_throughput, report.max_concurrent_requests,
      report.total_input_tokens, report.total_output_tokens, report.output_throughput, report.max_output_tokens_per_s,
      report.total_token_throughput);
  out += fmt::format("{:<24}{:>10}{:>10}{:>10}", "milliseconds", "mean", "median", "std");
  for (const double percentile : options.percentiles) out += fmt::format("{:>10}", percentile_name(percentile));
  out += "\n";
  for (const std::string& metric : options.metrics) {
    const Distribution& values = report.latencies_ms.at(metric);
    out +=
        fmt::format("{:<24}{:>10.2f}{:>10.2f}{:>10.2f}", metric_title(metric), values.mean, values.median, values.std);
    for (const double percentile : options.percentiles)
      out += fmt::format("{:>10.2f}", values.percentiles.at(percentile));
    out += "\n";
  }
  for (const auto& [message, count] : report.errors) out += fmt::format("failed {:>6} x  {}\n", count, message);
  return out;
}

}  // namespace tandem::bench
