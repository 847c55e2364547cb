// What a test keeps of one request's events.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <vector>

#include "src/engine/worker.h"

namespace tandem::engine {

// Collects one request's events.
class Answer {
 public:
  EventSink sink() {
    return [this](TokenEvent&& event) {
      const std::lock_guard<std::mutex> lock(mutex_);
      EXPECT_FALSE(done_) << "an event after the last one";
      for (const GeneratedToken& token : event.tokens) tokens_.push_back(token.token);
      if (event.finish) finish_ = event.finish;
      if (event.error) error_ = event.error;
      usage_ = event.usage;
      done_ = event.finish || event.error;
      changed_.notify_all();
    };
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::seconds(30), [this] { return done_; })) << "no last event";
  }
  void wait_for_tokens(size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::seconds(30), [&] { return tokens_.size() >= count || done_; }));
  }
  std::vector<TokenId> tokens() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return tokens_;
  }
  std::optional<FinishReason> finish_;
  std::optional<Error> error_;
  TokenUsage usage_;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<TokenId> tokens_;
  bool done_ = false;
};

}  // namespace tandem::engine
