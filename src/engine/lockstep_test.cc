// Engines of one group, as threads with fake models: who steps when, and what becomes of requests when a rank is lost.
#include "src/engine/lockstep.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <ctime>
#include <thread>

#include "src/engine/engine.h"
#include "src/engine/fake_model.h"
#include "src/engine/test_answer.h"
#include "src/group/test_support.h"

namespace tandem::engine {
namespace {

using testing::HasSubstr;

// One rank: an engine, and how many steps it computed with and without rows of its own.
struct TestRank {
  TestRank(int32_t rank, int32_t size) : group(group::RankId(rank), size), lockstep(group, nullptr, registry) {
    model.before_forward = [this](const model::Batch& batch) {
      ++(batch.tokens.empty() ? empty_steps : own_steps);
      if (batch.split_row != 0) ++split_steps;
    };
    EngineOptions options;
    options.model_name = "fake";
    options.limits.block_size = 4;
    options.sampled_vocab = FakeModel::kVocab;
    options.dual_batch = {true, 2, 6};
    engine = std::make_unique<Engine>(model, cache, options, clock, registry);
    engine->attach(&lockstep);
  }

  SteadyClock clock;
  FakeModel model{64, 4};
  std::unique_ptr<kernels::Ops> ops = kernels::make_ops("ref", 1).value();
  model::KvCache cache{*ops, model.info().kv, 64};
  Registry registry;
  group::TestRankGroup group;
  Lockstep lockstep;
  std::atomic<int> own_steps = 0;
  std::atomic<int> empty_steps = 0;
  std::atomic<int> split_steps = 0;
  std::unique_ptr<Engine> engine;
};

class LockstepTest : public testing::Test {
 protected:
  void start(int32_t size, int64_t rank_timeout_us = 10'000'000) {
    limits_.rank_timeout_us = rank_timeout_us;
    for (int32_t r = 0; r < size; ++r) ranks_.push_back(std::make_unique<TestRank>(r, size));
    form();
    for (const auto& rank : ranks_) rank->engine->start();
  }
  void form() {
    std::vector<std::byte*> bells;
    for (const auto& rank : ranks_) bells.push_back(rank->group.bell_memory());
    const int32_t size = static_cast<int32_t>(ranks_.size());
    epochs_.push_back(
        std::make_unique<group::ThreadGroup>(size, group::StepAgreement::window_bytes(size), limits_, bells,
                                             group::Epoch(epochs_.size() + 1)));
    for (int32_t r = 0; r < size; ++r) ranks_[static_cast<size_t>(r)]->group.form(epochs_.back()->fabric(r));
  }
  void lose(const std::string& why) {
    for (const auto& rank : ranks_) rank->group.lose(make_error(ErrorKind::kUnavailable, "{}", why));
  }
  Engine& engine(size_t rank) { return *ranks_[rank]->engine; }
  static TokenRequest request(std::vector<TokenId> prompt, int64_t max_tokens) {
    TokenRequest result;
    result.prompt = std::move(prompt);
    result.sampling.temperature = 0;
    result.sampling.max_tokens = max_tokens;
    return result;
  }

  group::FabricLimits limits_;
  std::vector<std::unique_ptr<group::ThreadGroup>> epochs_;  // before the ranks that use them, so destroyed after
  std::vector<std::unique_ptr<TestRank>> ranks_;
};

TEST_F(LockstepTest, RanksWithoutRequestsTakePartInEveryStep) {
  start(4);
  Answer answer;
  engine(2).submit(request({5, 6, 7}, 20), answer.sink());
  answer.wait();
  EXPECT_EQ(answer.tokens(), FakeModel::generate({5, 6, 7}, 20));
  EXPECT_EQ(ranks_[2]->own_steps, 20);
  EXPECT_EQ(ranks_[2]->empty_steps, 0);
  for (const size_t idle : {size_t{0}, size_t{1}, size_t{3}}) {
    // The last of them may still be on its way.
    for (int i = 0; i < 500 && ranks_[idle]->empty_steps < 20; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EXPECT_EQ(ranks_[idle]->empty_steps, 20);
    EXPECT_EQ(ranks_[idle]->own_steps, 0);
  }
}

TEST_F(LockstepTest, AllRanksAnswerAtTheSameTime) {
  start(3);
  std::vector<std::vector<Answer>> answers(3);
  for (size_t r = 0; r < 3; ++r) {
    answers[r] = std::vector<Answer>(8);
    for (size_t i = 0; i < 8; ++i) {
      const TokenId first = static_cast<TokenId>(r * 8 + i);
      engine(r).submit(request({first, 1, 2}, 5 + static_cast<int64_t>(3 * i + r)), answers[r][i].sink());
    }
  }
  for (size_t r = 0; r < 3; ++r) {
    for (size_t i = 0; i < 8; ++i) {
      answers[r][i].wait();
      EXPECT_EQ(answers[r][i].tokens(),
                FakeModel::generate({static_cast<TokenId>(r * 8 + i), 1, 2}, 5 + static_cast<int64_t>(3 * i + r)));
    }
  }
}

// A step has two parts on all ranks or on none.
TEST_F(LockstepTest, AllRanksSplitAStepOrNone) {
  start(2);
  // 3 rows of a prompt on rank 0 and nothing on rank 1, then one row: too few everywhere.
  Answer alone;
  engine(0).submit(request({1, 2, 3}, 5), alone.sink());
  alone.wait();
  EXPECT_EQ(ranks_[0]->split_steps, 0);
  // Enough on rank 0 only.
  std::vector<Answer> many(4);
  for (size_t i = 0; i < 4; ++i) engine(0).submit(request({static_cast<TokenId>(i), 2, 3, 4, 5, 6, 7}, 5), many[i].sink());
  for (Answer& answer : many) answer.wait();
  EXPECT_EQ(ranks_[0]->split_steps, 0);
  EXPECT_EQ(ranks_[1]->split_steps, 0);
  // Two streams on each: as long as both ranks have two rows, both split.
  for (const auto& rank : ranks_) rank->model.delay_us = 1'000;
  std::array<std::vector<Answer>, 2> both;
  for (size_t r = 0; r < 2; ++r) {
    both[r] = std::vector<Answer>(3);
    for (size_t i = 0; i < 3; ++i) engine(r).submit(request({static_cast<TokenId>(r), 1}, 50), both[r][i].sink());
  }
  for (std::vector<Answer>& answers : both) {
    for (Answer& answer : answers) answer.wait();
  }
  for (int i = 0; i < 500 && ranks_[0]->split_steps != ranks_[1]->split_steps; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_GT(ranks_[0]->split_steps, 20);
  EXPECT_EQ(ranks_[0]->split_steps, ranks_[1]->split_steps);
  for (size_t r = 0; r < 2; ++r) {
    for (Answer& answer : both[r]) EXPECT_EQ(answer.tokens(), FakeModel::generate({static_cast<TokenId>(r), 1}, 50));
  }
}

TEST_F(LockstepTest, AnIdleGroupSleeps) {
  start(4);
  Answer answer;
  engine(0).submit(request({1}, 3), answer.sink());
  answer.wait();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  timespec before{};
  timespec after{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
  std::this_thread::sleep_for(std::chrono::seconds(1));
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
  const int64_t used_us = (after.tv_sec - before.tv_sec) * 1'000'000 + (after.tv_nsec - before.tv_nsec) / 1000;
  EXPECT_LT(used_us, 10'000);
}

TEST_F(LockstepTest, ALostRankEndsRequestsAndTheNextEpochTakesNewOnes) {
  start(2);
  for (int round = 0; round < 5; ++round) {
    for (const auto& rank : ranks_) rank->model.delay_us = 5'000;
    Answer running;
    Answer other;
    engine(0).submit(request({1, 2}, 60), running.sink());
    engine(1).submit(request({3, 4}, 60), other.sink());
    running.wait_for_tokens(3);
    lose("rank 1 is gone: connection closed");
    running.wait();
    other.wait();
    for (Answer* answer : {&running, &other}) {
      ASSERT_TRUE(answer->error_.has_value());
      EXPECT_EQ(answer->error_->kind, ErrorKind::kUnavailable);
    }
    EXPECT_THAT(running.error_->message, HasSubstr("rank 1 is gone"));
    Answer refused;
    engine(0).submit(request({1, 2}, 5), refused.sink());
    refused.wait();
    ASSERT_TRUE(refused.error_.has_value());
    EXPECT_THAT(refused.error_->message, HasSubstr("rank 1 is gone"));

    form();
    for (const auto& rank : ranks_) rank->model.delay_us = 0;
    Answer again;
    // The engine may not have seen yet that the group stands.
    for (int i = 0; i < 500 && !ranks_[0]->lockstep.status().ok(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    engine(0).submit(request({1, 2}, 10), again.sink());
    again.wait();
    EXPECT_FALSE(again.error_.has_value()) << again.error_->message;
    EXPECT_EQ(again.tokens(), FakeModel::generate({1, 2}, 10));
  }
}

// A rank that hangs in its part of a step: the other notices by itself, without anybody telling it.
TEST_F(LockstepTest, ARankThatHangsIsNamed) {
  start(2, 200'000);
  ranks_[1]->model.delay_us = 1'500'000;
  Answer answer;
  engine(0).submit(request({1, 2}, 60), answer.sink());
  answer.wait();
  ASSERT_TRUE(answer.error_.has_value());
  EXPECT_THAT(answer.error_->message, HasSubstr("rank 1 has shown no sign of life"));
}

}  // namespace
}  // namespace tandem::engine
