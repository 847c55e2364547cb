// Keeps the memory of KV blocks present a little ahead of their first use.
//
// The cache is reserved at start and is large; the system finds pages for it only when they are written first, and then
// whoever writes waits: half a millisecond for a huge page, on a virtual machine whose host must find them too ten and
// more. In a step that adds up, since sequences of one age reach new blocks together. A thread therefore makes blocks
// present before they are handed out. Once requests run it works a tenth of the time at most: priority alone does not
// keep it from using up a control group's share of the processors. Memory that no request ever needs stays unused.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "src/model/kv_cache.h"

namespace tandem::kv {

class Populator {
 public:
  static constexpr int64_t kAheadBytes = int64_t{64} << 20;

  // Begins with the first `ahead_bytes`. The cache outlives it.
  explicit Populator(model::KvCache& cache, int64_t ahead_bytes = kAheadBytes);
  ~Populator();

  // Blocks 0 … num_blocks - 1 have been handed out. Never waits.
  void note_used(int64_t num_blocks);
  // Blocks from 0 on that have been used or whose memory is present. From any thread.
  int64_t num_present() const;

 private:
  void run();
  Status populate(std::unique_lock<std::mutex>& lock, BlockId first, int64_t count);

  model::KvCache& cache_;
  const int64_t ahead_blocks_;
  const int64_t chunk_blocks_;
  mutable std::mutex mutex_;
  std::condition_variable has_changed_;
  int64_t used_ = 0;     // blocks
  int64_t present_ = 0;  // blocks
  bool is_stopping_ = false;
  std::thread thread_;
};

}  // namespace tandem::kv
