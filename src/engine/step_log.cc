#include "src/engine/step_log.h"

namespace tandem::engine {

void StepLog::add(const StepTimes& step) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (ring_.empty()) ring_.reserve(kSteps);
  if (ring_.size() < kSteps) {
    ring_.push_back(step);
    return;
  }
  ring_[next_] = step;
  next_ = (next_ + 1) % kSteps;
}

std::vector<StepTimes> StepLog::steps() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<StepTimes> steps(ring_.begin() + static_cast<ptrdiff_t>(next_), ring_.end());
  steps.insert(steps.end(), ring_.begin(), ring_.begin() + static_cast<ptrdiff_t>(next_));
  return steps;
}

}  // namespace tandem::engine
