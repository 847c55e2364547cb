// Metrics of requests as clients see them, under vLLM's names and with its buckets. What happens inside the engine is
// the engine's to count.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "src/api/http_server.h"
#include "src/base/metrics.h"

namespace tandem::api {

class RequestMetrics {
 public:
  // `max_model_len` ends the buckets of token counts.
  RequestMetrics(Registry& registry, const std::string& model_name, int64_t max_model_len);

  void started(int64_t n, int64_t max_tokens) {
    params_n_.observe(static_cast<double>(n));
    params_max_tokens_.observe(static_cast<double>(max_tokens));
  }
  void first_token(double seconds_since_arrival) { first_token_seconds_.observe(seconds_since_arrival); }
  // `count` tokens came together, `seconds` after the ones before.
  void next_tokens(double seconds, uint64_t count) {
    inter_token_seconds_.observe_many(seconds / static_cast<double>(count), count);
  }
  // One choice has ended. `reason`: "stop", "length", "abort" (its client left) or "error".
  void ended(std::string_view reason, double seconds, double decode_seconds, int64_t prompt_tokens, int64_t tokens);
  // All choices have ended; `tokens` of the longest.
  void longest_choice(int64_t tokens) { max_generation_tokens_.observe(static_cast<double>(tokens)); }

 private:
  Histogram& params_n_;
  Histogram& params_max_tokens_;
  Histogram& first_token_seconds_;
  Histogram& inter_token_seconds_;
  Histogram& token_seconds_;
  Histogram& e2e_seconds_;
  Histogram& prompt_tokens_;
  Histogram& generation_tokens_;
  Histogram& max_generation_tokens_;
  Counter& stop_;
  Counter& length_;
  Counter& abort_;
  Counter& error_;
};

// http_requests_total and http_request_duration_seconds; routes that machines poll are left out. Remembers the series,
// because finding one by its labels takes microseconds. Used by one thread.
class HttpMetrics {
 public:
  explicit HttpMetrics(Registry& registry) : registry_(registry) {}
  void count(const HttpRecord& record);

 private:
  // There are as many as routes, methods and kinds of status that occur together.
  struct Series {
    std::string route;
    std::string method;
    int status_kind;  // 2 of 200 and so on
    Counter* requests;
    Histogram* seconds;
  };
  Series& find(const HttpRecord& record);

  Registry& registry_;
  std::vector<Series> series_;
};

}  // namespace tandem::api
