#include "src/text/stop_matcher.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <random>

namespace tandem::text {
namespace {

struct Outcome {
  std::string text;
  std::optional<size_t> stop;
  bool operator==(const Outcome&) const = default;
};

// What the matcher must do, written the slow way: the match whose end comes first, of those the longest.
Outcome search_slowly(const std::vector<std::string>& stops, bool include, const std::string& text) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::optional<size_t> found;
    for (size_t i = 0; i < stops.size(); ++i) {
      const bool here = std::string_view(text).substr(0, end).ends_with(stops[i]);
      if (here && (!found || stops[*found].size() < stops[i].size())) found = i;
    }
    if (found) return {text.substr(0, include ? end : end - stops[*found].size()), found};
  }
  return {text, std::nullopt};
}

Outcome run(const std::vector<std::string>& stops, bool include, const std::vector<std::string>& pieces) {
  StopMatcher matcher = StopMatcher::create(stops, include).value();
  Outcome outcome;
  for (const std::string& piece : pieces) {
    outcome.stop = matcher.push(piece, true, outcome.text);
    if (outcome.stop) return outcome;
  }
  matcher.finish(outcome.text);
  return outcome;
}

TEST(StopMatcher, FindsTheStopWhateverTheCut) {
  const uint64_t seed = std::random_device{}();
  std::mt19937_64 random(seed);
  const auto random_string = [&](size_t longest) {
    std::string text(1 + random() % longest, 'a');
    for (char& c : text) c = "ab"[random() % 2];
    return text;
  };
  for (int round = 0; round < 3000; ++round) {
    std::vector<std::string> stops(1 + random() % 3);
    for (std::string& stop : stops) stop = random_string(6);
    if (random() % 3 == 0) stops.push_back("b" + stops[0]);
    std::sort(stops.begin(), stops.end());
    stops.erase(std::unique(stops.begin(), stops.end()), stops.end());
    const std::string text = random_string(40);
    std::vector<std::string> pieces;
    for (size_t at = 0; at < text.size();) {
      const size_t size = random() % 5;
      pieces.push_back(text.substr(at, size));
      at += size;
    }
    const bool include = random() % 2 == 0;
    ASSERT_EQ(run(stops, include, pieces), search_slowly(stops, include, text))
        << "seed " << seed << ", round " << round << ", text " << text;
  }
}

TEST(StopMatcher, HoldsBackNoMoreThanABeginning) {
  StopMatcher matcher = StopMatcher::create({"\n\nUser:", "END"}, false).value();
  std::string out;
  EXPECT_FALSE(matcher.push("one\n", true, out));
  EXPECT_EQ(out, "one");
  EXPECT_FALSE(matcher.push("\nUs", true, out));
  EXPECT_EQ(out, "one");
  EXPECT_FALSE(matcher.push("ers E", true, out));
  EXPECT_EQ(out, "one\n\nUsers ");
  EXPECT_FALSE(matcher.push("N", true, out));
  EXPECT_EQ(matcher.push("D of it", true, out), 1U);
  EXPECT_EQ(out, "one\n\nUsers ");
}

TEST(StopMatcher, FinishGivesBackWhatWasHeld) {
  StopMatcher matcher = StopMatcher::create({"。終わり"}, false).value();
  std::string out;
  EXPECT_FALSE(matcher.push("はい。終", true, out));
  EXPECT_EQ(out, "はい");
  matcher.finish(out);
  EXPECT_EQ(out, "はい。終");
}

TEST(StopMatcher, TooEarlyStopsDoNotCount) {
  StopMatcher matcher = StopMatcher::create({"ab"}, true).value();
  std::string out;
  EXPECT_FALSE(matcher.push("xabya", false, out));
  EXPECT_EQ(out, "xaby");
  EXPECT_EQ(matcher.push("bz", true, out), 0U);
  EXPECT_EQ(out, "xabyab");
}

TEST(StopMatcher, WithoutStopsTextPasses) {
  StopMatcher matcher = StopMatcher::create({}, false).value();
  std::string out;
  EXPECT_FALSE(matcher.push("anything", true, out));
  EXPECT_EQ(out, "anything");
}

TEST(StopMatcher, RefusesBadStops) {
  for (const std::vector<std::string>& stops :
       {std::vector<std::string>{""}, std::vector<std::string>{std::string(StopMatcher::kMaxStringBytes + 1, 'x')},
        std::vector<std::string>(StopMatcher::kMaxStrings + 1, "x")}) {
    const Result<StopMatcher> result = StopMatcher::create(stops, false);
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.error().param, "stop");
  }
}

TEST(StopMatcher, WorstCaseStaysLinear) {
  const auto time_us = [](size_t bytes) {
    StopMatcher matcher = StopMatcher::create({std::string(1000, 'a') + "b"}, false).value();
    std::string out;
    const auto start = std::chrono::steady_clock::now();
    for (size_t i = 0; i < bytes; i += 4) EXPECT_FALSE(matcher.push("aaaa", true, out));
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
  };
  time_us(100'000);
  // Four times the text: 4 if linear, a thousand times more work per byte if every piece searched anew. Other processes
  // disturb short measurements, so the bound is generous.
  const double small_us = std::min(time_us(400'000), time_us(400'000));
  EXPECT_LT(std::min(time_us(1'600'000), time_us(1'600'000)) / small_us, 32);
}

}  // namespace
}  // namespace tandem::text
