#include "src/kv/populator.h"

#include <algorithm>
#include <chrono>

#include "src/base/background.h"
#include "src/base/log.h"

namespace tandem::kv {

namespace {

using std::chrono::steady_clock;

// Of one layer, in one go. Longer pieces are later pauses.
constexpr int64_t kChunkBytes = int64_t{1} << 20;
constexpr int kPauses = 9;  // as long as the work before, beside running requests

int64_t blocks_in(int64_t bytes, int64_t block_bytes) { return std::max<int64_t>(1, bytes / block_bytes); }

}  // namespace

Populator::Populator(model::KvCache& cache, int64_t ahead_bytes)
    : cache_(cache),
      ahead_blocks_(blocks_in(ahead_bytes, cache.layout().total_block_bytes())),
      chunk_blocks_(blocks_in(kChunkBytes, cache.layout().block_bytes())),
      thread_([this] { run(); }) {}

Populator::~Populator() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
  }
  has_changed_.notify_all();
  thread_.join();
}

void Populator::note_used(int64_t num_blocks) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (num_blocks <= used_) return;
    used_ = num_blocks;
    present_ = std::max(present_, used_);  // by its user, if it was not before
  }
  has_changed_.notify_all();
}

int64_t Populator::num_present() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return present_;
}

void Populator::run() {
  yield_to_all_others("making KV memory present");
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    const auto end = [this] { return std::min(used_ + ahead_blocks_, cache_.num_blocks()); };
    has_changed_.wait(lock, [&] { return is_stopping_ || present_ < end(); });
    if (is_stopping_) return;
    const int64_t first = present_;
    const int64_t count = std::min(chunk_blocks_, end() - first);
    if (const Status populated = populate(lock, BlockId(static_cast<int32_t>(first)), count); !populated.ok()) {
      log_warning("kv", "steps that use new KV memory take longer: {}", populated.error().message);
      return;
    }
    present_ = std::max(present_, first + count);
  }
}

Status Populator::populate(std::unique_lock<std::mutex>& lock, BlockId first, int64_t count) {
  for (int64_t layer = 0; layer < cache_.layout().num_layers && !is_stopping_; ++layer) {
    lock.unlock();
    const steady_clock::time_point begin = steady_clock::now();
    const Status populated = cache_.populate(layer, first, count);
    const steady_clock::duration took = steady_clock::now() - begin;
    lock.lock();
    TANDEM_TRY(populated);
    if (used_ > 0) has_changed_.wait_for(lock, took * kPauses, [this] { return is_stopping_; });
  }
  return {};
}

}  // namespace tandem::kv
