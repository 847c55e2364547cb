// Rotary position embedding: the table of cosines and sines, with YaRN scaling if the config asks for it.
#pragma once

#include <cstdint>
#include <vector>

#include "src/model/config.h"

namespace tandem::model {

// 0.1 · a · ln(factor) + 1 for factor > 1, else 1 (YaRN, arXiv:2309.00071, §3.4, with DeepSeek's coefficient a).
double yarn_mscale(double factor, double a);

// Multiplier of all cosines and sines: mscale(mscale) / mscale(mscale_all_dim), which is plain YaRN's 0.1 ln(s) + 1
// where the config gives neither; `attention_factor` replaces it; 1 without YaRN.
double rope_attention_factor(const RopeConfig& rope);

// First and last frequency index of YaRN's ramp between kept and divided frequencies.
struct YarnRamp {
  double low = 0;
  double high = 0;
};
YarnRamp yarn_ramp(const RopeConfig& rope, int64_t dim);

// Angle per position of each of the dim / 2 frequencies.
std::vector<float> rope_frequencies(const RopeConfig& rope, int64_t dim);

// [positions, dim]: dim / 2 cosines, then dim / 2 sines, times the attention factor. Angles are f32 products, as in
// the libraries that trained the models.
std::vector<float> rope_table(const RopeConfig& rope, int64_t dim, int64_t positions);

}  // namespace tandem::model
