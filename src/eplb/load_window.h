// Statistics of the last steps in bounded memory: a ring of buckets, each the sum of as many steps. The window
// therefore slides by a bucket, not by a step, and its buckets are the samples that the `flash` policy takes its
// variance from.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/eplb/expert_load.h"

namespace tandem::eplb {

class LoadWindow {
 public:
  // Sixteen samples tell a steady expert from a bursty one; more would cost memory and planning time in proportion.
  static constexpr int64_t kBuckets = 16;

  // Remembers the last `window_steps` steps, less those of the part of a bucket that has left: at least
  // window_steps - steps_per_bucket() + 1 once as many have been seen.
  LoadWindow(int64_t num_layers, int64_t num_experts, int64_t window_steps);

  // One step's tokens.
  void add_step(const ExpertLoad& step);
  void clear();

  int64_t num_steps() const;  // remembered
  int64_t steps_per_bucket() const { return steps_per_bucket_; }
  const ExpertLoad& total() const { return total_; }
  LoadSeries samples() const;  // of the buckets that have steps; empty when there was none

 private:
  int64_t steps_per_bucket_;
  std::vector<ExpertLoad> buckets_;  // [at most kBuckets]
  std::vector<int64_t> steps_;       // in each bucket
  size_t newest_ = 0;
  ExpertLoad total_;
};

}  // namespace tandem::eplb
