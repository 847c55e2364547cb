#include "src/engine/step_budget.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace tandem::engine {
namespace {

constexpr int64_t kFirstPriceEnd = 1024;
// Steps scatter by a tenth or so around what was expected; aiming below the limit keeps most of them under it.
constexpr double kAim = 0.9;
// Many streams alone may take longer than a step should. Prompts still get this share of it, or they would crawl.
constexpr double kLeastPromptShare = 0.25;
// A measurement counts half, and as no more than twice or half of what was expected: a step during which the machine
// did something else is forgotten after two more, a lasting change is followed within a few.
constexpr double kLearningRate = 0.5;
constexpr double kLargestSurprise = 2;
// Of a step with a prompt, at least this share is the prompt's, however long streams alone took lately.
constexpr double kLeastMeasuredShare = 0.125;

}  // namespace

size_t StepBudget::price_index(int64_t position) {
  const size_t width = static_cast<size_t>(std::bit_width(static_cast<uint64_t>(position / kFirstPriceEnd)));
  return std::min(width, kNumPrices - 1);
}

// Where nothing was measured yet: the nearest price from earlier positions, which bounds this one when doubled for
// every doubling of the position, or else that from later positions.
std::optional<double> StepBudget::row_us(int64_t position) const {
  const size_t index = price_index(position);
  for (size_t i = index + 1; i-- > 0;) {
    // Next door is reached in small steps from where it was measured, hence without doubling.
    if (prices_[i]) return std::ldexp(*prices_[i], std::max(0, static_cast<int>(index - i) - 1));
  }
  for (size_t i = index + 1; i < kNumPrices; ++i) {
    if (prices_[i]) return prices_[i];
  }
  return std::nullopt;
}

std::optional<double> StepBudget::prompt_us() const {
  if (max_step_us_ == 0) return std::nullopt;
  const double step_us = kAim * static_cast<double>(max_step_us_);
  return std::max(step_us - streams_us_, kLeastPromptShare * step_us);
}

int64_t StepBudget::rows_within(double left_us, int64_t position) const {
  const std::optional<double> price = row_us(position);
  if (!price) return kRowMultiple;
  constexpr double kMany = 1e9;
  const int64_t rows = static_cast<int64_t>(std::clamp(left_us / *price, 0.0, kMany));
  return rows / kRowMultiple * kRowMultiple;
}

double StepBudget::cost_us(int64_t rows, int64_t position) const {
  const std::optional<double> price = row_us(position);
  return price ? *price * static_cast<double>(rows) : static_cast<double>(max_step_us_);
}

void StepBudget::learn(std::span<const ChunkRows> chunks, int64_t step_us) {
  const double measured_us = static_cast<double>(std::max<int64_t>(step_us, 1));
  if (chunks.empty()) {
    const double expected = streams_us_ > 0 ? streams_us_ : measured_us;
    streams_us_ = expected + kLearningRate * (std::min(measured_us, kLargestSurprise * expected) - expected);
    return;
  }
  const double prompt_us = std::max(measured_us - streams_us_, kLeastMeasuredShare * measured_us);
  double rows = 0;
  double expected_us = 0;
  for (const ChunkRows& chunk : chunks) {
    rows += static_cast<double>(chunk.num_rows);
    expected_us += row_us(chunk.first_position).value_or(0) * static_cast<double>(chunk.num_rows);
  }
  const double surprise =
      expected_us > 0 ? std::clamp(prompt_us / expected_us, 1 / kLargestSurprise, kLargestSurprise) : 1;
  // The last few rows of a prompt cost more each than the next chunk's will; they say little.
  const double weight = kLearningRate * std::min(1.0, rows / static_cast<double>(kRowMultiple));
  std::array<std::optional<double>, kNumPrices> updated = prices_;
  for (const ChunkRows& chunk : chunks) {
    // The first price is that of the whole step, too dear: it then falls towards what is measured, not from below.
    const double expected = row_us(chunk.first_position).value_or(measured_us / rows);
    updated[price_index(chunk.first_position)] = expected * (1 + weight * (surprise - 1));
  }
  prices_ = updated;
}

}  // namespace tandem::engine
