// A thread for text work that would hold up the I/O thread: parsing, rendering and tokenizing large bodies.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace tandem::api {

class TextThread {
 public:
  static constexpr size_t kMaxJobs = 256;

  TextThread();
  ~TextThread();  // waiting jobs are dropped, the running one is waited for
  TextThread(const TextThread&) = delete;
  TextThread& operator=(const TextThread&) = delete;

  // False if kMaxJobs wait already.
  bool post(std::function<void()> job);

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace tandem::api
