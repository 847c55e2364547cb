// The prompts of a benchmark. Everything is drawn from one seed, so two runs send the same requests.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "src/base/ids.h"
#include "src/base/result.h"

namespace tandem::bench {

struct PromptRequest {
  std::variant<std::vector<TokenId>, std::string> prompt;  // token ids, or text
  int64_t input_len = 0;  // tokens, or words of a text; the server's usage replaces it where it is given
  int64_t max_tokens = 0;
};

struct DatasetOptions {
  int64_t num_prompts = 0;
  int64_t input_len = 0;
  int64_t output_len = 0;
  int64_t prefix_len = 0;  // common to all, in front
  double range_ratio = 0;  // lengths are even in [len * (1 - ratio), len * (1 + ratio)], at least 1
  int64_t vocab_size = 0;  // random ids only
  uint64_t seed = 0;
};

std::vector<PromptRequest> make_random_prompts(const DatasetOptions& options);
std::vector<PromptRequest> make_text_prompts(const DatasetOptions& options);
// One JSON object a line: {"prompt": text or ids, "output_len": optional}. The first num_prompts lines, from the start
// again if there are fewer. Faults name file and line.
Result<std::vector<PromptRequest>> load_custom_prompts(const std::string& path, const DatasetOptions& options);

// Seconds from the start at which each request is sent: a Poisson process of `rate` per second, or all zero if
// infinite.
std::vector<double> make_arrivals(int64_t count, double rate, uint64_t seed);

}  // namespace tandem::bench
