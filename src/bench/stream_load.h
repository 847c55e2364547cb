// A load generator for streamed answers that costs few microseconds a request: the requests are rendered beforehand,
// and an answer is looked at once, when it is complete. For measuring a router, which is faster than `run_load`.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "src/base/result.h"

namespace boost::asio {
class io_context;
}

namespace tandem::bench {

struct StreamRequest {
  std::string bytes;     // of the whole HTTP request
  std::string expected;  // see StreamLoadOptions::key
};

struct StreamLoadOptions {
  uint16_t port = 0;  // on loopback
  // What stands between each `key` and the next `close` of an answer, all of it joined, must be the expected text.
  std::string key = "\"text\":\"";
  char close = '"';
  int64_t connections = 64;  // of a closed loop; the most at once of an open one
  // Requests per second as a Poisson process: an arrival that finds no connection free waits, and its time runs from
  // when it should have been sent (no coordinated omission). 0: a closed loop, each connection sends as it may.
  double rate = 0;
  double seconds = 1;
  uint64_t seed = 0;                // of arrivals
  std::function<void()> on_second;  // called about once a second meanwhile
};

struct StreamLoadResult {
  int64_t completed = 0;
  int64_t failed = 0;
  std::string first_fault;
  double seconds = 0;                 // until the last answer
  std::vector<double> first_token_s;  // of each completed request
  std::vector<double> whole_s;
};

// Sends requests[0], [1] … round and round for `seconds` and waits for the answers, at most kDrainSeconds more. Runs
// `io` meanwhile, so that mock workers may share its thread: two threads on one core would wait for each other's time
// slices, and milliseconds of that would be counted as latency.
StreamLoadResult run_stream_load(boost::asio::io_context& io, const std::vector<StreamRequest>& requests,
                                 const StreamLoadOptions& options);
inline constexpr int kDrainSeconds = 10;

// "" if the answer is one whole response with status 200 and the expected text, else what is wrong with it.
std::string fault_of_answer(std::string_view answer, const StreamRequest& request, const StreamLoadOptions& options);

}  // namespace tandem::bench
