// Sends prompts to a server at chosen times and records what came back and when. Open loop (a Poisson process, or all
// at once), optionally with a bound on what is in flight (closed loop).
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "src/api/http_types.h"
#include "src/bench/dataset.h"
#include "src/bench/report.h"

namespace tandem::bench {

struct LoadOptions {
  api::HttpUrl url;
  bool chat = false;  // /v1/chat/completions instead of /v1/completions
  std::string model;
  std::string api_key;
  double temperature = 0;
  bool ignore_eos = false;
  double request_rate = 0;      // per second, or infinite
  int64_t max_concurrency = 0;  // 0: no bound
  uint64_t seed = 0;            // of arrival times and sampling
  std::chrono::milliseconds request_timeout{600'000};
  // Called a few times per second with how many requests have ended.
  std::function<void(int64_t ended, int64_t total)> on_progress;
};

struct LoadResult {
  std::vector<RequestRecord> records;  // in the order of the prompts
  double duration = 0;                 // seconds from the first request's sending to the last one's end
};

// Blocks until every request has ended. Token-id prompts need the completions endpoint.
LoadResult run_load(const std::vector<PromptRequest>& prompts, const LoadOptions& options);

// The body of one request as JSON text.
std::string request_body(const PromptRequest& prompt, const LoadOptions& options, uint64_t seed);

}  // namespace tandem::bench
