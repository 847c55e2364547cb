// A router by itself: a real `tandem route` process on one core, instant mock workers behind it and a load before it.
//
// What is measured: requests per second of a closed loop, the router's processor time for each, what the router adds
// to latency under a Poisson load (beside the same load sent to a worker directly), and whether its memory grows.
#pragma once

#include <cstdint>
#include <string>

#include "src/base/result.h"

namespace tandem::bench {

struct RouterBenchOptions {
  std::string program;       // the tandem program
  std::string model;         // directory: the router's tokenizer
  std::string log_path;      // of the router
  bool pairs = false;        // prefill and decode workers, pushes; else decode workers alone
  int num_workers = 2;       // of each role
  int64_t input_len = 32;    // words of a prompt
  int64_t output_len = 16;   // tokens of an answer
  double token_gap_ms = 0;   // of the mocks; 0: an answer is there at once
  double seconds = 10;       // of each phase
  int64_t concurrency = 64;  // of the closed loop
  double rate = 2500;        // of the Poisson load, requests per second
  double slope_seconds = 0;  // 0: memory is not watched
  uint64_t seed = 0;
};

struct LatencyPair {
  double p50_ms = 0;
  double p99_ms = 0;
};

struct RouterBenchResult {
  int router_cpu = 0;
  int load_cpu = 0;          // of the mocks and the load
  double prompt_tokens = 0;  // mean

  // Closed loop.
  double requests_per_s = 0;
  double router_busy = 0;          // share of its core
  double cpu_us_per_request = 0;   // of the router
  double requests_per_core_s = 0;  // 1 / cpu per request: what one core could do if nothing else held it up

  // Poisson load. Added: percentile through the router less the same percentile without it.
  double rate = 0;
  double cpu_us_per_request_at_rate = 0;
  LatencyPair direct_first_token, routed_first_token;
  LatencyPair direct_whole, routed_whole;

  // Memory.
  double slope_seconds = 0;  // watched, without the warm-up
  double slope_bytes_per_s = 0;
  double slope_bytes_per_request = 0;
  int64_t resident_first_bytes = 0;
  int64_t resident_last_bytes = 0;
};

// A failed or wrong answer is an error. Needs two cores.
Result<RouterBenchResult> run_router_bench(const RouterBenchOptions& options);

std::string router_report_as_text(const RouterBenchOptions& options, const RouterBenchResult& result);
std::string router_report_as_json(const RouterBenchOptions& options, const RouterBenchResult& result);

}  // namespace tandem::bench
