// How long the last steps took and what they waited for, to find out why one was late: `GET /steps`.
//
// A step lasts from its beginning in the step loop, when it is planned, until its tokens are handed out. With a rank
// group that includes the wait until all ranks have entered the round, what rides along with it (experts that move) and
// the exchanges inside the model. Waiting for work is not part of it.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace tandem::engine {

struct StepTimes {
  uint64_t round = 0;  // of the epoch, 1 …; the same on all ranks. 0 without a group
  int64_t begin_us = 0;  // of the engine's clock
  int64_t total_us = 0;
  int64_t wait_us = 0;     // of it, until all ranks had entered the round
  int64_t ride_us = 0;     // of it, for what rides along
  int64_t ride_bytes = 0;  // that this rank sent and took so
  int64_t compute_us = 0;  // of it, inside the model
  int64_t rows = 0;        // of this rank
};

class StepLog {
 public:
  static constexpr size_t kSteps = 1 << 14;  // that are kept

  // Engine thread.
  void add(const StepTimes& step);
  // Oldest first. From any thread.
  std::vector<StepTimes> steps() const;

 private:
  mutable std::mutex mutex_;
  std::vector<StepTimes> ring_;
  size_t next_ = 0;  // the oldest, once the ring is full
};

}  // namespace tandem::engine
