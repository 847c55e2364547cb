// For tests: a worker that says what the test tells it to, from a thread that is not the I/O thread.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "src/api/test_support.h"
#include "src/base/clock.h"
#include "src/engine/worker.h"

namespace tandem::api {

class MockWorker final : public engine::Worker {
 public:
  // Runs on the worker's thread for every request, if set; else the test calls emit().
  using Answer = std::function<void(const engine::TokenRequest&, const engine::EventSink&)>;

  explicit MockWorker(Answer answer = {}) : answer_(std::move(answer)), thread_([this] { run(); }) {}
  ~MockWorker() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

  RequestId submit(engine::TokenRequest request, engine::EventSink sink) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    requests_.push_back(std::move(request));
    sinks_.push_back(std::move(sink));
    cancelled_us_.push_back(0);
    if (answer_) queue_.push_back(requests_.size() - 1);
    wake_.notify_all();
    return RequestId(requests_.size());  // 1, 2, …
  }
  void cancel(RequestId id) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    CHECK_LE(id.value, requests_.size());
    cancelled_us_[id.value - 1] = clock_.now_us();
    wake_.notify_all();
  }

  void release(const transfer::KvTransferParams& publication) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    released_.push_back(publication.remote_engine_id + " " + publication.remote_request_id);
    wake_.notify_all();
  }

  // Waits until `count` publications were released; each as "engine handle".
  std::vector<std::string> wait_for_releases(size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait_for(lock, std::chrono::seconds(10), [&] { return released_.size() >= count; });
    return released_;
  }
  size_t num_requests() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return requests_.size();
  }
  engine::TokenRequest request(size_t index) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return requests_.at(index);
  }
  // Waits for `count` requests.
  bool wait_for(size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    return wake_.wait_for(lock, std::chrono::seconds(10), [&] { return requests_.size() >= count; });
  }
  // Waits until request `index` is cancelled; its time on SteadyClock, or 0.
  int64_t wait_for_cancel(size_t index) {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait_for(lock, std::chrono::seconds(10), [&] { return cancelled_us_.at(index) != 0; });
    return cancelled_us_[index];
  }
  bool is_cancelled(size_t index) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return cancelled_us_.at(index) != 0;
  }
  void emit(size_t index, engine::TokenEvent event) {
    engine::EventSink sink;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      sink = sinks_.at(index);
    }
    sink(std::move(event));
  }

 private:
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopping_) {
      wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      while (!stopping_ && !queue_.empty()) {
        const size_t index = queue_.front();
        queue_.pop_front();
        const engine::TokenRequest request = requests_[index];
        const engine::EventSink sink = sinks_[index];
        lock.unlock();
        answer_(request, sink);
        lock.lock();
      }
    }
  }

  const Answer answer_;
  SteadyClock clock_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<engine::TokenRequest> requests_;
  std::vector<engine::EventSink> sinks_;
  std::vector<int64_t> cancelled_us_;
  std::deque<size_t> queue_;
  std::vector<std::string> released_;
  bool stopping_ = false;
  std::thread thread_;
};

// An event with these tokens; `prompt_tokens` of usage as given.
inline engine::TokenEvent tokens_event(const std::vector<TokenId>& tokens, int64_t prompt_tokens = 3,
                                       std::optional<engine::FinishReason> finish = std::nullopt) {
  engine::TokenEvent event;
  for (const TokenId token : tokens) event.tokens.push_back({.token = token, .logprob = -0.5F, .top_logprobs = {}});
  event.usage.prompt_tokens = prompt_tokens;
  event.finish = finish;
  return event;
}

}  // namespace tandem::api
