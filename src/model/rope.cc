#include "src/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tandem::model {

double yarn_mscale(double factor, double a) { return factor > 1 ? 0.1 * a * std::log(factor) + 1 : 1; }

double rope_attention_factor(const RopeConfig& rope) {
  if (!rope.is_yarn) return 1;
  if (rope.attention_factor.has_value()) return *rope.attention_factor;
  return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim);
}

YarnRamp yarn_ramp(const RopeConfig& rope, int64_t dim) {
  const double d = static_cast<double>(dim);
  // The index of the frequency that turns `rotations` times within the original context.
  const auto index_of = [&](double rotations) {
    return d * std::log(static_cast<double>(rope.original_max_position) / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(rope.theta));
  };
  YarnRamp ramp{index_of(rope.beta_fast), index_of(rope.beta_slow)};
  if (rope.truncate) ramp = {std::floor(ramp.low), std::ceil(ramp.high)};
  ramp.low = std::max(ramp.low, 0.0);
  ramp.high = std::min(ramp.high, d - 1);
  if (ramp.low == ramp.high) ramp.high += 0.001;
  return ramp;
}

std::vector<float> rope_frequencies(const RopeConfig& rope, int64_t dim) {
  const YarnRamp bounds = rope.is_yarn ? yarn_ramp(rope, dim) : YarnRamp{};
  std::vector<float> frequencies;
  for (int64_t i = 0; i < dim / 2; ++i) {
    double frequency = std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
    if (rope.is_yarn) {
      const double ramp = std::clamp((static_cast<double>(i) - bounds.low) / (bounds.high - bounds.low), 0.0, 1.0);
      frequency = frequency / rope.factor * ramp + frequency * (1 - ramp);
    }
    frequencies.push_back(static_cast<float>(frequency));
  }
  return frequencies;
}

std::vector<float> rope_table(const RopeConfig& rope, int64_t dim, int64_t positions) {
  const std::vector<float> frequencies = rope_frequencies(rope, dim);
  const double factor = rope_attention_factor(rope);
  std::vector<float> table(static_cast<size_t>(positions * dim));
  float* row = table.data();
  for (int64_t position = 0; position < positions; ++position) {
    for (size_t i = 0; i < frequencies.size(); ++i) {
      const double angle = static_cast<double>(static_cast<float>(position) * frequencies[i]);
      row[i] = static_cast<float>(std::cos(angle) * factor);
      row[frequencies.size() + i] = static_cast<float>(std::sin(angle) * factor);
    }
    row += dim;
  }
  return table;
}

}  // namespace tandem::model
