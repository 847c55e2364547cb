#include "src/text/stop_matcher.h"

#include <algorithm>

#include "src/base/check.h"

namespace tandem::text {
namespace {

// The prefix function of Knuth, Morris and Pratt.
std::vector<uint32_t> make_fallback(std::string_view text) {
  std::vector<uint32_t> fallback(text.size() + 1, 0);
  uint32_t border = 0;
  for (size_t i = 1; i < text.size(); ++i) {
    while (border > 0 && text[i] != text[border]) border = fallback[border];
    if (text[i] == text[border]) ++border;
    fallback[i + 1] = border;
  }
  return fallback;
}

}  // namespace

Result<StopMatcher> StopMatcher::create(std::vector<std::string> stops, bool include_stop) {
  if (stops.size() > kMaxStrings) {
    return invalid_argument("stop", "stop: {} strings, the limit is {}", stops.size(), kMaxStrings);
  }
  StopMatcher matcher;
  matcher.include_stop_ = include_stop;
  for (std::string& stop : stops) {
    if (stop.empty() || stop.size() > kMaxStringBytes) {
      return invalid_argument("stop", "stop: a string of {} bytes, must be 1 … {}", stop.size(), kMaxStringBytes);
    }
    std::vector<uint32_t> fallback = make_fallback(stop);
    matcher.patterns_.push_back({std::move(stop), std::move(fallback)});
  }
  return matcher;
}

std::optional<size_t> StopMatcher::push(std::string_view piece, bool may_stop, std::string& out) {
  CHECK(!ended_);
  const size_t old_size = held_.size();
  held_ += piece;
  for (size_t at = old_size; at < held_.size(); ++at) {
    std::optional<size_t> found;
    for (size_t i = 0; i < patterns_.size(); ++i) {
      Pattern& pattern = patterns_[i];
      while (pattern.matched > 0 && pattern.text[pattern.matched] != held_[at]) {
        pattern.matched = pattern.fallback[pattern.matched];
      }
      if (pattern.text[pattern.matched] == held_[at]) ++pattern.matched;
      if (pattern.matched < pattern.text.size()) continue;
      pattern.matched = pattern.fallback[pattern.matched];
      if (may_stop && (!found || patterns_[*found].text.size() < pattern.text.size())) found = i;
    }
    if (!found) continue;
    ended_ = true;
    const size_t end = at + 1;
    out.append(held_, 0, include_stop_ ? end : end - patterns_[*found].text.size());
    held_.clear();
    return found;
  }
  // Everything that no stop string can begin in any more is certain.
  uint32_t keep = 0;
  for (const Pattern& pattern : patterns_) keep = std::max(keep, pattern.matched);
  const size_t certain = held_.size() - keep;
  out.append(held_, 0, certain);
  held_.erase(0, certain);
  return std::nullopt;
}

void StopMatcher::finish(std::string& out) {
  CHECK(!ended_);
  ended_ = true;
  out += held_;
  held_.clear();
}

}  // namespace tandem::text
