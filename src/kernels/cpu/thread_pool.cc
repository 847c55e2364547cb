#include "src/kernels/cpu/thread_pool.h"

#include <immintrin.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>

#include "src/base/check.h"
#include "src/kernels/cpu/topology.h"

namespace tandem::kernels::cpu {
namespace {

constexpr uint64_t kIndexMask = 0xFFFFFFFFU;

// Spins until `done()`, for kSpinMicroseconds at most. Returns whether it was done.
template <typename Predicate>
bool spin_until(Predicate done) {
  constexpr int kPausesPerLook = 16;
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(kSpinMicroseconds);
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (done()) return true;
      _mm_pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  CHECK_GE(num_threads, 1);
  CHECK_LE(num_threads, kMaxThreads);
  const Topology& machine = Topology::of_this_machine();
  const std::vector<int> nodes = machine.place_threads(num_threads);
  for (int worker = 1; worker < num_threads; ++worker) {
    threads_.emplace_back([this, &machine, worker, node = nodes[static_cast<size_t>(worker)]] {
      machine.bind_this_thread(node);
      work_until_stopped(worker);
    });
    ::pthread_setname_np(threads_.back().native_handle(), "compute");
  }
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  wake_.fetch_add(1);
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run_erased(int64_t count, Function function, const void* context) {
  CHECK_GE(count, 0);
  CHECK_LE(count, kMaxLoopCount);
  if (count == 0) return;
  if (count == 1 || threads_.empty()) {
    for (int64_t index = 0; index < count; ++index) function(context, index, 0);
    return;
  }
  const std::lock_guard<std::mutex> lock(run_mutex_);
  // The ticket is closed while the loop changes: whoever sees one of the new values also sees the old ticket gone.
  const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store(epoch << 32 | kIndexMask, std::memory_order_relaxed);
  function_.store(function, std::memory_order_release);
  context_.store(context, std::memory_order_release);
  count_.store(static_cast<uint32_t>(count), std::memory_order_release);
  unfinished_.store(static_cast<uint32_t>(count), std::memory_order_relaxed);
  ticket_.store(epoch << 32, std::memory_order_release);
  wake_.fetch_add(1, std::memory_order_release);
  if (count > static_cast<int64_t>(threads_.size())) {
    wake_.notify_all();
  } else {
    for (int64_t i = 1; i < count; ++i) wake_.notify_one();
  }
  claim_indices(0);
  wait_for_completion();
}

void ThreadPool::claim_indices(int worker) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (true) {
    const Function function = function_.load(std::memory_order_acquire);
    const void* context = context_.load(std::memory_order_acquire);
    const uint32_t count = count_.load(std::memory_order_acquire);
    const uint64_t index = ticket & kIndexMask;
    if (index >= count) return;
    // Success proves that the ticket has not moved, hence that the three values above belong to its loop, which cannot
    // end before this very index is finished.
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      continue;
    }
    function(context, static_cast<int64_t>(index), worker);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_all();
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void ThreadPool::wait_for_completion() {
  const auto finished = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
  if (spin_until(finished)) return;
  while (!finished()) {
    const uint32_t left = unfinished_.load(std::memory_order_acquire);
    if (left != 0) unfinished_.wait(left, std::memory_order_acquire);
  }
}

void ThreadPool::work_until_stopped(int worker) {
  uint32_t seen = wake_.load(std::memory_order_acquire);
  while (!stopping_.load()) {
    claim_indices(worker);
    const auto changed = [this, seen] { return wake_.load(std::memory_order_acquire) != seen; };
    if (!spin_until(changed)) wake_.wait(seen, std::memory_order_acquire);
    seen = wake_.load(std::memory_order_acquire);
  }
}

}  // namespace tandem::kernels::cpu
