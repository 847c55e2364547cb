#include "src/bench/engine_load.h"

#include <cmath>
#include <condition_variable>
#include <mutex>

#include "src/base/check.h"

namespace tandem::bench {
namespace {

// Written by the worker's thread, read when all have ended.
class Collector {
 public:
  Collector(size_t count, const Clock& clock) : records_(count), last_us_(count, 0), left_(count), clock_(clock) {}

  void started(size_t index, int64_t input_len) {
    const std::lock_guard<std::mutex> lock(mutex_);
    last_us_[index] = clock_.now_us();
    if (index == 0) begin_us_ = last_us_[index];
    records_[index].input_len = input_len;
    records_[index].start = seconds(last_us_[index] - begin_us_);
  }

  void take(size_t index, const engine::TokenEvent& event) {
    const int64_t now_us = clock_.now_us();
    const std::lock_guard<std::mutex> lock(mutex_);
    RequestRecord& record = records_[index];
    if (!event.tokens.empty()) {
      if (record.output_len == 0) {
        record.ttft = seconds(now_us - begin_us_) - record.start;
      } else {
        record.itls.push_back(seconds(now_us - last_us_[index]));
      }
      record.output_len += static_cast<int64_t>(event.tokens.size());
      last_us_[index] = now_us;
    }
    if (!event.finish && !event.error) return;
    record.success = event.finish.has_value();
    if (event.error) record.error = event.error->message;
    record.latency = seconds(now_us - begin_us_) - record.start;
    if (--left_ == 0) all_ended_.notify_one();
  }

  EngineRun wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_ended_.wait(lock, [this] { return left_ == 0; });
    return {std::move(records_), seconds(clock_.now_us() - begin_us_)};
  }

 private:
  static double seconds(int64_t us) { return static_cast<double>(us) * 1e-6; }

  std::mutex mutex_;
  std::condition_variable all_ended_;
  std::vector<RequestRecord> records_;
  std::vector<int64_t> last_us_;
  size_t left_;
  int64_t begin_us_ = 0;
  const Clock& clock_;
};

}  // namespace

EngineRun run_on_worker(engine::Worker& worker, const std::vector<PromptRequest>& prompts, const Clock& clock) {
  CHECK(!prompts.empty());
  Collector collector(prompts.size(), clock);
  for (size_t i = 0; i < prompts.size(); ++i) {
    engine::TokenRequest request;
    request.prompt = std::get<std::vector<TokenId>>(prompts[i].prompt);
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    request.sampling.max_tokens = prompts[i].max_tokens;
    collector.started(i, static_cast<int64_t>(request.prompt.size()));
    worker.submit(std::move(request), [&collector, i](engine::TokenEvent&& event) { collector.take(i, event); });
  }
  return collector.wait();
}

double WeightTraffic::bytes_per_step(double rows) const {
  const double touched = 1 - std::pow(1 - top_k / num_experts, rows);
  return weight_bytes - lookup_bytes - expert_bytes * (1 - touched);
}

}  // namespace tandem::bench
