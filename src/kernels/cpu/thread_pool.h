// A fixed set of threads that share loops. A loop's indices are claimed one by one, so a thread that is late (asleep,
// or not scheduled on a busy machine) delays nobody: the caller works too and waits only for indices already claimed.
// Waiting threads spin for kSpinMicroseconds, because the next operation of a step usually follows at once, and then
// sleep in the kernel. On a machine of several NUMA nodes the pool's own threads are spread over them.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace tandem::kernels::cpu {

inline constexpr int kMaxThreads = 256;
inline constexpr int kSpinMicroseconds = 20;
inline constexpr int64_t kMaxLoopCount = (int64_t{1} << 31) - 1;

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // 1 … kMaxThreads, the caller of run included
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls body(index, worker) for every index in [0, count), each once, worker in [0, num_threads()). Returns when all
  // have returned. `body` must not throw and must not call run. Callers in several threads take turns.
  template <typename Body>
  void run(int64_t count, Body&& body) {
    using Callable = std::remove_reference_t<Body>;
    const auto call = [](const void* context, int64_t index, int worker) {
      (*static_cast<Callable*>(const_cast<void*>(context)))(index, worker);
    };
    run_erased(count, call, &body);
  }

 private:
  using Function = void (*)(const void* context, int64_t index, int worker);

  void run_erased(int64_t count, Function function, const void* context);
  void work_until_stopped(int worker);
  void claim_indices(int worker);
  void wait_for_completion();

  std::mutex run_mutex_;
  // The loop now running. Written before `ticket_` opens it and read by whoever then claims an index; a thread that
  // read them too late loses its claim, since the ticket's epoch has moved on.
  std::atomic<Function> function_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<uint32_t> count_{0};
  alignas(64) std::atomic<uint64_t> ticket_{0};  // epoch << 32 | next index
  alignas(64) std::atomic<uint32_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> wake_{0};  // changes when a loop opens or the pool stops
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;
};

}  // namespace tandem::kernels::cpu
