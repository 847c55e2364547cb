// What a router takes from one event of a completion stream, and a scanner for the shape that workers send for nearly
// every token. A document per token was a third of the router's time.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "src/base/ids.h"
#include "src/engine/worker.h"

namespace tandem::router {

struct ChunkFields {
  bool has_usage = false;  // then the two counts are those it gives
  std::optional<int64_t> prompt_tokens;
  std::optional<int64_t> cached_tokens;
  bool has_choice = false;  // then what follows is of the first choice
  std::vector<engine::GeneratedToken> tokens;
  std::optional<engine::FinishReason> finish;
  std::optional<int64_t> stop_reason;
};

// "stop", "length", "abort"; "" is none, everything else an error.
std::optional<engine::FinishReason> finish_of_name(std::string_view name);

// Exactly what a JSON reader would find, or nothing if the text has anything unusual, which the caller then reads as a
// document: escapes, other than ASCII, fractions, negative numbers, a field twice, log-probabilities, an error,
// kv_transfer_params, several choices, or no JSON at all.
std::optional<ChunkFields> scan_chunk(std::string_view text);

}  // namespace tandem::router
