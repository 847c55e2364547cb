#include "src/bench/dataset.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string_view>

namespace tandem::bench {
namespace {

constexpr std::array<std::string_view, 48> kWords = {
    "the",   "a",     "one",    "every",   "small", "old",   "bright",  "quiet", "river", "stone",  "garden", "letter",
    "child", "ship",  "winter", "market",  "house", "road",  "teacher", "song",  "finds", "sees",   "keeps",  "carries",
    "draws", "opens", "leaves", "builds",  "under", "over",  "beside",  "near",  "after", "before", "with",   "without",
    "and",   "but",   "while",  "because", "often", "never", "slowly",  "today", "again", "here",   "there",  "then"};

int64_t draw_length(std::mt19937_64& random, int64_t length, double ratio) {
  const double center = static_cast<double>(length);
  const int64_t low = std::max<int64_t>(1, static_cast<int64_t>(std::floor(center * (1 - ratio))));
  const int64_t high = std::max(low, static_cast<int64_t>(std::ceil(center * (1 + ratio))));
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

std::string draw_text(std::mt19937_64& random, int64_t words) {
  std::string text;
  int64_t in_sentence = 0;
  for (int64_t i = 0; i < words; ++i) {
    std::string word(kWords[std::uniform_int_distribution<size_t>(0, kWords.size() - 1)(random)]);
    if (in_sentence == 0) word[0] = static_cast<char>(word[0] - 'a' + 'A');
    text += (i == 0 ? "" : " ") + word;
    if (++in_sentence == 9) {
      text += '.';
      in_sentence = 0;
    }
  }
  return text;
}

std::vector<TokenId> draw_tokens(std::mt19937_64& random, int64_t count, int64_t vocab_size) {
  std::vector<TokenId> tokens(static_cast<size_t>(count));
  std::uniform_int_distribution<TokenId> any(0, static_cast<TokenId>(vocab_size - 1));
  for (TokenId& token : tokens) token = any(random);
  return tokens;
}

}  // namespace

std::vector<PromptRequest> make_random_prompts(const DatasetOptions& options) {
  CHECK_GT(options.vocab_size, 0);
  std::mt19937_64 random(options.seed);
  const std::vector<TokenId> prefix = draw_tokens(random, options.prefix_len, options.vocab_size);
  std::vector<PromptRequest> requests;
  for (int64_t i = 0; i < options.num_prompts; ++i) {
    std::vector<TokenId> prompt = prefix;
    const int64_t length = draw_length(random, options.input_len, options.range_ratio);
    const std::vector<TokenId> own = draw_tokens(random, length, options.vocab_size);
    prompt.insert(prompt.end(), own.begin(), own.end());
    const int64_t input_len = std::ssize(prompt);
    requests.push_back({std::move(prompt), input_len, draw_length(random, options.output_len, options.range_ratio)});
  }
  return requests;
}

std::vector<PromptRequest> make_text_prompts(const DatasetOptions& options) {
  std::mt19937_64 random(options.seed);
  std::string prefix = draw_text(random, options.prefix_len);
  if (!prefix.empty()) prefix += ' ';
  std::vector<PromptRequest> requests;
  for (int64_t i = 0; i < options.num_prompts; ++i) {
    const int64_t length = draw_length(random, options.input_len, options.range_ratio);
    std::string prompt = prefix + draw_text(random, length);
    const int64_t output_len = draw_length(random, options.output_len, options.range_ratio);
    requests.push_back({std::move(prompt), options.prefix_len + length, output_len});
  }
  return requests;
}

Result<std::vector<PromptRequest>> load_custom_prompts(const std::string& path, const DatasetOptions& options) {
  std::ifstream file(path);
  if (!file)
    return make_error(ErrorKind::kNotFound, "{}: cannot be read; give --dataset-path a file of JSON lines", path);
  std::vector<PromptRequest> requests;
  int64_t number = 0;
  for (std::string line; std::ssize(requests) < options.num_prompts && std::getline(file, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const auto fault = [&](std::string_view why) {
      return invalid_argument("dataset-path", "{}:{}: {}", path, number, why);
    };
    const nlohmann::json object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object() || !object.contains("prompt")) return fault("must be a JSON object with 'prompt'");
    PromptRequest request;
    request.max_tokens = options.output_len;
    const nlohmann::json& prompt = object["prompt"];
    if (prompt.is_string()) {
      request.prompt = prompt.get<std::string>();
      const std::string& text = std::get<std::string>(request.prompt);
      request.input_len = 1 + std::count(text.begin(), text.end(), ' ');
    } else if (prompt.is_array() && !prompt.empty() &&
               std::all_of(prompt.begin(), prompt.end(), [](const auto& id) { return id.is_number_integer(); })) {
      request.prompt = prompt.get<std::vector<TokenId>>();
      request.input_len = std::ssize(prompt);
    } else {
      return fault("'prompt' must be a text or a list of token ids");
    }
    if (object.contains("output_len")) {
      const nlohmann::json& length = object["output_len"];
      if (!length.is_number_integer() || length.get<int64_t>() < 1)
        return fault("'output_len' must be a positive integer");
      request.max_tokens = length.get<int64_t>();
    }
    requests.push_back(std::move(request));
  }
  if (requests.empty()) return invalid_argument("dataset-path", "{}: has no prompts", path);
  const size_t distinct = requests.size();
  while (std::ssize(requests) < options.num_prompts) {
    PromptRequest again = requests[requests.size() % distinct];
    requests.push_back(std::move(again));
  }
  return requests;
}

std::vector<double> make_arrivals(int64_t count, double rate, uint64_t seed) {
  std::vector<double> arrivals(static_cast<size_t>(count), 0.0);
  if (std::isinf(rate)) return arrivals;
  std::mt19937_64 random(seed ^ 0x9e3779b97f4a7c15ULL);  // another stream than the prompts'
  std::exponential_distribution<double> gap(rate);
  double now = 0;
  for (double& arrival : arrivals) {
    arrival = now;
    now += gap(random);
  }
  return arrivals;
}

}  // namespace tandem::bench
