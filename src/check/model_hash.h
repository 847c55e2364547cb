// Whether two folders hold the same model, told in milliseconds and without loading it.
#pragma once

#include <string>

#include "src/base/result.h"

namespace tandem::check {

struct ModelHashes {
  std::string config;  // of config.json, without what cannot change a result
  std::string
      weights;  // of each safetensors file: name, size, header, and kSamples pieces of its data; "" if there is none
  std::string tokenizer;  // of tokenizer.json, whole; "" if there is none
};

inline constexpr int kSamples = 16;
inline constexpr int64_t kSampleBytes = 4096;

// A single changed weight between the samples is not seen: the ranks themselves compare more when they meet.
Result<ModelHashes> hash_model(const std::string& folder);

}  // namespace tandem::check
