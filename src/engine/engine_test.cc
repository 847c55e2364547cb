// The engine with a fake model: life of a request, cancels, deadlines, preemption, conservation of blocks.
#include "src/engine/engine.h"

#include <gtest/gtest.h>

#include <map>
#include <mutex>
#include <random>

#include "src/engine/fake_model.h"
#include "src/engine/test_answer.h"

namespace tandem::engine {
namespace {

class EngineTest : public testing::Test {
 protected:
  void start(int64_t num_blocks, SchedulerLimits limits, int64_t max_model_len = 64) {
    start(num_blocks, limits, max_model_len, clock_, nullptr);
  }
  void start(int64_t num_blocks, SchedulerLimits limits, int64_t max_model_len, const Clock& clock,
             std::function<void(const model::Batch&)> before_forward) {
    ops_ = kernels::make_ops("ref", 1).value();
    limits.block_size = 4;
    model_ = std::make_unique<FakeModel>(max_model_len, limits.block_size);
    model_->before_forward = std::move(before_forward);
    cache_ = std::make_unique<model::KvCache>(*ops_, model_->info().kv, num_blocks);
    EngineOptions options;
    options.model_name = "fake";
    options.limits = limits;
    options.eos_ids = {};
    options.sampled_vocab = FakeModel::kVocab;
    registry_ = std::make_unique<Registry>();
    engine_ = std::make_unique<Engine>(*model_, *cache_, options, clock, *registry_);
    engine_->start();
  }
  void TearDown() override { engine_.reset(); }

  static TokenRequest request(std::vector<TokenId> prompt, int64_t max_tokens) {
    TokenRequest result;
    result.prompt = std::move(prompt);
    result.sampling.temperature = 0;
    result.sampling.max_tokens = max_tokens;
    return result;
  }
  double metric(const std::string& name) {
    const std::string text = registry_->expose();
    const size_t at = text.find("\n" + name + "{");
    EXPECT_NE(at, std::string::npos) << name;
    return std::stod(text.substr(text.find("} ", at) + 2));
  }
  void expect_all_blocks_back() {
    for (int i = 0; i < 200 && metric("tandem:kv_blocks_available") != static_cast<double>(cache_->num_blocks()); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_EQ(metric("tandem:kv_blocks_available"), static_cast<double>(cache_->num_blocks()));
    EXPECT_EQ(metric("tandem:kv_blocks_pinned"), 0);
  }

  SteadyClock clock_;
  std::unique_ptr<kernels::Ops> ops_;
  std::unique_ptr<FakeModel> model_;
  std::unique_ptr<model::KvCache> cache_;
  std::unique_ptr<Registry> registry_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(EngineTest, AnswersWithTheModelsTokens) {
  start(32, {});
  Answer answer;
  engine_->submit(request({5, 6, 7}, 20), answer.sink());
  answer.wait();
  EXPECT_EQ(answer.tokens(), FakeModel::generate({5, 6, 7}, 20));
  EXPECT_EQ(answer.finish_, FinishReason::kLength);
  EXPECT_EQ(answer.usage_.prompt_tokens, 3);
  expect_all_blocks_back();
}

TEST_F(EngineTest, ManyAtOnceOverTooFewBlocks) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  for (const int64_t batched_tokens : {4, 7, 64}) {
    SchedulerLimits limits;
    limits.max_num_batched_tokens = batched_tokens;
    limits.max_num_seqs = 4;
    start(18, limits);
    std::vector<Answer> answers(60);
    std::vector<std::vector<TokenId>> prompts;
    for (Answer& answer : answers) {
      std::vector<TokenId> prompt(1 + random() % 30);
      for (TokenId& token : prompt) token = static_cast<TokenId>(random() % 2);  // many equal prefixes
      prompts.push_back(prompt);
      engine_->submit(request(prompt, 25), answer.sink());
    }
    for (size_t i = 0; i < answers.size(); ++i) {
      answers[i].wait();
      EXPECT_EQ(answers[i].tokens(), FakeModel::generate(prompts[i], 25)) << "request " << i;
    }
    EXPECT_GT(metric("vllm:num_preemptions_total"), 0);
    EXPECT_GT(metric("vllm:prefix_cache_hits_total"), 0);
    expect_all_blocks_back();
    engine_.reset();
  }
}

TEST_F(EngineTest, StopsAtTheContextLength) {
  start(32, {}, 16);
  Answer answer;
  engine_->submit(request({1, 2, 3}, 1000), answer.sink());
  answer.wait();
  EXPECT_EQ(answer.tokens().size(), 13U);
  EXPECT_EQ(answer.finish_, FinishReason::kLength);
}

TEST_F(EngineTest, StopTokenAndMinTokens) {
  start(32, {});
  const std::vector<TokenId> expected = FakeModel::generate({9}, 10);
  Answer answer;
  TokenRequest stopped = request({9}, 10);
  stopped.sampling.stop_token_ids = {expected[3]};
  engine_->submit(stopped, answer.sink());
  answer.wait();
  EXPECT_EQ(answer.finish_, FinishReason::kStop);
  EXPECT_EQ(answer.tokens().back(), expected[3]);
  EXPECT_LE(answer.tokens().size(), 4U);

  Answer later;
  stopped.sampling.min_tokens = 6;
  engine_->submit(stopped, later.sink());
  later.wait();
  EXPECT_GE(later.tokens().size(), 6U);
}

TEST_F(EngineTest, CancelFreesBlocksAndStaysSilent) {
  start(32, {});
  model_->delay_us = 1000;
  Answer answer;
  const RequestId id = engine_->submit(request({1, 2, 3}, 60), answer.sink());
  answer.wait_for_tokens(3);
  engine_->cancel(id);
  engine_->cancel(RequestId(12345));
  expect_all_blocks_back();
  EXPECT_LT(answer.tokens().size(), 60U);
  EXPECT_FALSE(answer.finish_);
}

TEST_F(EngineTest, DeadlineEndsARequestWithAnError) {
  start(32, {});
  model_->delay_us = 20'000;
  Answer answer;
  TokenRequest late = request({1, 2, 3}, 60);
  late.deadline_us = clock_.now_us() + 100'000;
  const int64_t begin_us = clock_.now_us();
  engine_->submit(late, answer.sink());
  answer.wait();
  ASSERT_TRUE(answer.error_);
  EXPECT_EQ(answer.error_->kind, ErrorKind::kDeadlineExceeded);
  EXPECT_LT(clock_.now_us() - begin_us, 2'000'000);
  expect_all_blocks_back();
}

TEST_F(EngineTest, RefusesWhatItCannotServe) {
  SchedulerLimits limits;
  limits.max_num_waiting = 1;
  limits.max_num_seqs = 1;
  start(32, limits);
  const auto refused = [this](TokenRequest bad) {
    Answer answer;
    engine_->submit(std::move(bad), answer.sink());
    answer.wait();
    return answer.error_ ? *answer.error_ : Error{};
  };
  EXPECT_EQ(refused(request({}, 5)).param, "prompt");
  EXPECT_EQ(refused(request({1, -1}, 5)).param, "prompt");
  EXPECT_EQ(refused(request({1, 97}, 5)).param, "prompt");
  EXPECT_EQ(refused(request(std::vector<TokenId>(64, 1), 5)).code, "context_length_exceeded");
  TokenRequest remote = request({1}, 5);
  remote.kv_transfer.emplace().do_remote_decode = true;
  EXPECT_EQ(refused(remote).param, "kv_transfer_params");

  model_->delay_us = 50'000;
  Answer running;
  Answer waiting;
  engine_->submit(request({1}, 3), running.sink());
  running.wait_for_tokens(1);
  engine_->submit(request({2}, 3), waiting.sink());
  EXPECT_EQ(refused(request({3}, 3)).kind, ErrorKind::kResourceExhausted);
  running.wait();
  waiting.wait();
  EXPECT_EQ(waiting.tokens(), FakeModel::generate({2}, 3));
}

TEST_F(EngineTest, NanLogitsFailOneRequestAlone) {
  start(32, {});
  model_->poison = 50;
  Answer bad;
  Answer good;
  engine_->submit(request({1, 50}, 3), bad.sink());
  engine_->submit(request({1, 51}, 3), good.sink());
  bad.wait();
  good.wait();
  ASSERT_TRUE(bad.error_);
  EXPECT_EQ(bad.error_->kind, ErrorKind::kDataLoss);
  EXPECT_EQ(good.finish_, FinishReason::kLength);
  EXPECT_EQ(metric("vllm:corrupted_requests_total"), 1);
  expect_all_blocks_back();
}

TEST_F(EngineTest, StopEndsEveryRequest) {
  start(32, {});
  model_->delay_us = 5000;
  std::vector<Answer> answers(5);
  for (Answer& answer : answers) engine_->submit(request({1, 2}, 60), answer.sink());
  answers[0].wait_for_tokens(1);
  engine_->stop();
  for (Answer& answer : answers) {
    answer.wait();
    ASSERT_TRUE(answer.error_);
    EXPECT_EQ(answer.error_->kind, ErrorKind::kUnavailable);
  }
}

// Four streams run when a long prompt arrives, on a clock that only the model moves: 10 ms a step, 1 ms per stream, 2
// ms per prompt row and a tenth more per 100 positions before it. Whatever the limit makes of it, tokens stay the same.
TEST_F(EngineTest, LongPromptLeavesStreamsTheirTime) {
  std::vector<TokenId> long_prompt;
  for (int i = 0; i < 900; ++i) long_prompt.push_back(static_cast<TokenId>(i * 31 % FakeModel::kVocab));
  std::map<int64_t, int64_t> longest_us;  // by limit
  for (const int64_t max_step_us : {0, 1, 100'000}) {
    ManualClock clock;
    int64_t& longest = longest_us[max_step_us];
    int64_t prompt_steps = 0;
    SchedulerLimits limits;
    limits.max_num_batched_tokens = 512;
    limits.max_step_us = max_step_us;
    start(600, limits, 1024, clock, [&](const model::Batch& batch) {
      double cost_us = 10'000;
      bool has_streams = false;
      int64_t prompt_rows = 0;
      for (const model::Chunk& chunk : batch.chunks) {
        has_streams = has_streams || !chunk.is_prompt;
        if (chunk.is_prompt) prompt_rows += chunk.num_rows;
        cost_us += chunk.is_prompt ? chunk.num_rows * 2000.0 * (1 + chunk.first_position / 1000.0) : 1000.0;
      }
      clock.advance_us(static_cast<int64_t>(cost_us));
      if (!has_streams || prompt_rows == 0) return;
      // The price is unknown in the first such step, and small prompts come first.
      if (++prompt_steps > 4) longest = std::max(longest, static_cast<int64_t>(cost_us));
      EXPECT_TRUE(max_step_us != 1 || prompt_rows <= StepBudget::kRowMultiple);
    });
    std::vector<Answer> streams(4);
    for (size_t i = 0; i < 4; ++i) engine_->submit(request({static_cast<TokenId>(i)}, 120), streams[i].sink());
    for (Answer& stream : streams) stream.wait_for_tokens(1);
    Answer late;
    engine_->submit(request(long_prompt, 10), late.sink());
    late.wait();
    EXPECT_EQ(late.tokens(), FakeModel::generate(long_prompt, 10));
    for (size_t i = 0; i < 4; ++i) {
      streams[i].wait();
      EXPECT_EQ(streams[i].tokens(), FakeModel::generate({static_cast<TokenId>(i)}, 120));
    }
    engine_.reset();
  }
  EXPECT_LE(longest_us[100'000], 110'000);
}

// Random submits, cancels and deadlines from two threads; every answer that ends well is right, every block comes back.
// The KV of a prompt is made up: one row of it is computed, and the token in its cache is the filling.
TEST_F(EngineTest, MadeUpPromptsCostOneRow) {
  ops_ = kernels::make_ops("ref", 1).value();
  model_ = std::make_unique<FakeModel>(64, 4);
  std::atomic<int64_t> prompt_rows{0};
  model_->before_forward = [&](const model::Batch& batch) {
    for (const model::Chunk& chunk : batch.chunks) prompt_rows += chunk.is_prompt ? chunk.num_rows : 0;
  };
  cache_ = std::make_unique<model::KvCache>(*ops_, model_->info().kv, 32);
  EngineOptions options;
  options.limits.block_size = 4;
  options.limits.prefix_caching = false;
  options.sampled_vocab = FakeModel::kVocab;
  options.synthetic_fill = 0.0F;
  registry_ = std::make_unique<Registry>();
  engine_ = std::make_unique<Engine>(*model_, *cache_, options, clock_, *registry_);
  engine_->start();
  std::vector<TokenId> seen(11, 0);  // ten made up, and the prompt's last
  seen.back() = 9;
  Answer answer;
  engine_->submit(request({5, 6, 7, 5, 6, 7, 5, 6, 7, 8, 9}, 6), answer.sink());
  answer.wait();
  EXPECT_EQ(prompt_rows, 1);
  EXPECT_EQ(answer.tokens(), FakeModel::generate(seen, 6));
  expect_all_blocks_back();
}

TEST_F(EngineTest, StormConservesBlocks) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  SchedulerLimits limits;
  limits.max_num_batched_tokens = 12;
  limits.max_num_seqs = 6;
  start(20, limits);
  constexpr size_t kRequests = 300;
  std::vector<std::vector<Answer>> answers(2);
  for (std::vector<Answer>& list : answers) list = std::vector<Answer>(kRequests);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(seed + static_cast<unsigned>(t));
      for (Answer& answer : answers[t]) {
        const std::vector<TokenId> prompt(1 + random() % 20, static_cast<TokenId>(random() % 3));
        TokenRequest item = request(prompt, static_cast<int64_t>(1 + random() % 20));
        if (random() % 8 == 0) item.deadline_us = clock_.now_us() + static_cast<int64_t>(random() % 5000);
        const int64_t wanted = item.sampling.max_tokens;
        const RequestId id = engine_->submit(std::move(item), answer.sink());
        if (random() % 4 == 0) {
          std::this_thread::sleep_for(std::chrono::microseconds(random() % 2000));
          engine_->cancel(id);
        } else {
          answer.wait();
          if (answer.finish_) {
            EXPECT_EQ(answer.tokens(), FakeModel::generate(prompt, wanted));
          }
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect_all_blocks_back();
  engine_->stop();
}

}  // namespace
}  // namespace tandem::engine
