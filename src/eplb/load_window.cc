#include "src/eplb/load_window.h"

#include <algorithm>
#include <numeric>

#include "src/base/check.h"

namespace tandem::eplb {

LoadWindow::LoadWindow(int64_t num_layers, int64_t num_experts, int64_t window_steps)
    : steps_per_bucket_((window_steps + kBuckets - 1) / kBuckets), total_(num_layers, num_experts) {
  CHECK_GT(window_steps, 0);
  const size_t count = static_cast<size_t>(window_steps / steps_per_bucket_);
  buckets_.assign(count, ExpertLoad(num_layers, num_experts));
  steps_.assign(count, 0);
}

void LoadWindow::add_step(const ExpertLoad& step) {
  if (steps_[newest_] == steps_per_bucket_) {
    newest_ = (newest_ + 1) % buckets_.size();
    total_.subtract(buckets_[newest_]);
    buckets_[newest_].clear();
    steps_[newest_] = 0;
  }
  buckets_[newest_].add(step);
  total_.add(step);
  ++steps_[newest_];
}

void LoadWindow::clear() {
  for (ExpertLoad& bucket : buckets_) bucket.clear();
  std::fill(steps_.begin(), steps_.end(), 0);
  total_.clear();
  newest_ = 0;
}

int64_t LoadWindow::num_steps() const { return std::accumulate(steps_.begin(), steps_.end(), int64_t{0}); }

LoadSeries LoadWindow::samples() const {
  LoadSeries series;
  for (size_t i = 1; i <= buckets_.size(); ++i) {
    const size_t bucket = (newest_ + i) % buckets_.size();
    if (steps_[bucket] > 0) series.push_back(buckets_[bucket]);
  }
  return series;
}

}  // namespace tandem::eplb
