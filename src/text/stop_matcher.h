// Finds stop strings in text that arrives in pieces. Text that may still turn out to be the beginning of a stop string
// is held back, and never more than that. Time is linear in the text for each stop string.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/result.h"

namespace tandem::text {

class StopMatcher {
 public:
  static constexpr size_t kMaxStrings = 16;
  static constexpr size_t kMaxStringBytes = 4096;

  // `include_stop`: the stop string that ends the text is part of it. Errors: kInvalidArgument of "stop".
  static Result<StopMatcher> create(std::vector<std::string> stops, bool include_stop);

  // Appends to `out` the text that is certain now. Returns the index of the stop string that ended the text: the one
  // whose last byte comes first, of several the longest. How the text was cut into pieces makes no difference.
  // `may_stop` false (too few tokens yet): stop strings that end in this piece do not count, though one that begins in
  // it and ends later does.
  std::optional<size_t> push(std::string_view piece, bool may_stop, std::string& out);
  // The end of the text: appends what was held back. Nothing may be pushed after it, nor after a match.
  void finish(std::string& out);

 private:
  struct Pattern {
    std::string text;
    std::vector<uint32_t> fallback;  // fallback[n]: length of the longest proper border of the first n bytes
    uint32_t matched = 0;            // bytes of `text` that the text so far ends with
  };

  StopMatcher() = default;

  std::vector<Pattern> patterns_;
  bool include_stop_ = false;
  bool ended_ = false;
  std::string held_;
};

}  // namespace tandem::text
