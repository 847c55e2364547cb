// A Prometheus registry with the text exposition format 0.0.4. Names, labels and buckets are given by the caller, so
// that dashboards made for other servers (vLLM's names) read ours unchanged.
//
//   Registry registry;
//   Counter& tokens = registry.counter("vllm:prompt_tokens_total", "Prompt tokens processed.", {{"model_name", m}});
//   tokens.add(17);            // one relaxed atomic operation
//   std::string body = registry.expose();
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tandem {

using MetricLabels = std::vector<std::pair<std::string, std::string>>;

// Only grows. The name given to the registry should end in "_total"; nothing is added to it.
class Counter {
 public:
  void add(uint64_t amount = 1) { value_.fetch_add(amount, std::memory_order_relaxed); }
  uint64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

class Gauge {
 public:
  void set(double value) { value_.store(value, std::memory_order_relaxed); }
  void add(double amount) { value_.fetch_add(amount, std::memory_order_relaxed); }
  double value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<double> value_{0};
};

// Counts observations per bucket; the exposition makes them cumulative and adds "+Inf", _sum and _count.
class Histogram {
 public:
  // `upper_bounds` ascending, without infinity.
  explicit Histogram(std::vector<double> upper_bounds);
  void observe(double value) { observe_many(value, 1); }
  // As `count` calls of observe(value), for events that arrive in groups.
  void observe_many(double value, uint64_t count);

  std::span<const double> upper_bounds() const { return upper_bounds_; }
  uint64_t bucket_count(size_t index) const { return counts_[index].load(std::memory_order_relaxed); }
  double sum() const { return sum_.load(std::memory_order_relaxed); }
  uint64_t count() const;

 private:
  std::vector<double> upper_bounds_;
  std::vector<std::atomic<uint64_t>> counts_;  // upper_bounds_.size() + 1; the last is above every bound
  std::atomic<double> sum_{0};
};

// Series live as long as the registry. Asking again for a name with equal labels gives the same series; asking for a
// name with another type, help text or buckets is a bug. All members may be called from any thread.
class Registry {
 public:
  // Guards memory against a label made from user input.
  static constexpr size_t kMaxSeriesPerFamily = 10'000;

  Registry();
  ~Registry();
  Registry(const Registry&) = delete;
  Registry& operator=(const Registry&) = delete;

  Counter& counter(std::string_view name, std::string_view help, const MetricLabels& labels = {});
  Gauge& gauge(std::string_view name, std::string_view help, const MetricLabels& labels = {});
  Histogram& histogram(std::string_view name, std::string_view help, std::span<const double> upper_bounds,
                       const MetricLabels& labels = {});

  // Content type: kMetricsContentType. Families in the order of their names.
  std::string expose() const;

 private:
  struct Family;
  enum class Type { kCounter, kGauge, kHistogram };
  Family& find_family(Type type, std::string_view name, std::string_view help);

  mutable std::mutex mutex_;  // guards the maps, not the values
  std::map<std::string, std::unique_ptr<Family>, std::less<>> families_;
};

inline constexpr std::string_view kMetricsContentType = "text/plain; version=0.0.4; charset=utf-8";

// 1, 2, 5, 10, 20, 50 … up to and including `max_value`.
std::vector<double> one_two_five_buckets(double max_value);
// start, start + width, … (`count` of them).
std::vector<double> linear_buckets(double start, double width, size_t count);

// The bounds that vLLM's histograms have, in seconds and in tokens.
std::span<const double> time_to_first_token_buckets();  // time_to_first_token_seconds
std::span<const double> inter_token_buckets();  // inter_token_latency_seconds, request_time_per_output_token_seconds
std::span<const double> request_latency_buckets();  // e2e_request_latency, queue, inference, prefill and decode time
std::span<const double> iteration_token_buckets();  // iteration_tokens_total
std::span<const double> request_n_buckets();        // request_params_n

}  // namespace tandem
