// Tensor ranks: an engine that orders and one that follows, as threads with fake models whose KV is the tokens themselves.
#include "src/engine/follower.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "src/engine/engine.h"
#include "src/engine/fake_model.h"
#include "src/engine/test_answer.h"
#include "src/group/test_support.h"

namespace tandem::engine {
namespace {

using group::RankId;

constexpr int64_t kBlocks = 64;
constexpr int32_t kSize = 3;

tp::OrderOptions order_options() { return {RankId(0), kSize, 4096, 1024}; }

// What every rank has.
struct Part {
  explicit Part(int32_t rank) : group(RankId(rank), kSize) {}
  FakeModel model{64, 4};
  std::unique_ptr<kernels::Ops> ops = kernels::make_ops("ref", 1).value();
  model::KvCache cache{*ops, model.info().kv, kBlocks};
  Registry registry;
  group::TestRankGroup group;
};

struct Leader : Part {
  Leader() : Part(0) {
    EngineOptions options;
    options.model_name = "fake";
    options.limits.block_size = 4;
    options.limits.prefix_caching = true;
    options.sampled_vocab = FakeModel::kVocab;
    engine = std::make_unique<Engine>(model, cache, options, clock, registry);
    engine->attach(&lockstep);
    engine->attach(&orders);
  }
  SteadyClock clock;
  tp::OrderSender orders{order_options()};
  Lockstep lockstep{group, &orders, registry};
  std::unique_ptr<Engine> engine;
};

struct Following : Part {
  explicit Following(int32_t rank) : Part(rank) {
    model.before_forward = [this](const model::Batch&) { ++steps; };
  }
  tp::OrderReceiver orders{order_options()};
  Lockstep lockstep{group, &orders, registry};
  Follower follower{model, cache, lockstep, orders};
  std::atomic<int> steps = 0;
};

class FollowerTest : public testing::Test {
 protected:
  FollowerTest() {
    for (int32_t r = 1; r < kSize; ++r) following_.push_back(std::make_unique<Following>(r));
    form();
    leader_.engine->start();
    for (const auto& each : following_) each->follower.start();
  }
  ~FollowerTest() override {
    leader_.engine->stop();
    for (const auto& each : following_) each->follower.stop();
  }

  void form() {
    std::vector<std::byte*> bells{leader_.group.bell_memory()};
    for (const auto& each : following_) bells.push_back(each->group.bell_memory());
    epochs_.push_back(std::make_unique<group::ThreadGroup>(kSize, 4096 + 1024, group::FabricLimits{}, bells,
                                                           group::Epoch(epochs_.size() + 1)));
    leader_.group.form(epochs_.back()->fabric(0));
    for (int32_t r = 1; r < kSize; ++r) following_[static_cast<size_t>(r - 1)]->group.form(epochs_.back()->fabric(r));
  }
  void lose() {
    const Error why = make_error(ErrorKind::kUnavailable, "rank 1 is gone");
    leader_.group.lose(why);
    for (const auto& each : following_) each->group.lose(why);
  }

  void expect_answer(const std::vector<TokenId>& prompt, int64_t count) {
    TokenRequest request;
    request.prompt = prompt;
    request.sampling.max_tokens = count;
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    Answer answer;
    leader_.engine->submit(request, answer.sink());
    answer.wait();
    ASSERT_FALSE(answer.error_) << answer.error_->message;
    EXPECT_EQ(answer.tokens(), FakeModel::generate(prompt, count));
  }
  // Followers have read all that was sent only once they have answered a later order; the last step may be under way.
  void expect_same_caches() {
    const size_t bytes = static_cast<size_t>(leader_.cache.bytes());
    for (const auto& each : following_) {
      const auto is_same = [&] { return std::memcmp(each->cache.base(), leader_.cache.base(), bytes) == 0; };
      for (int i = 0; i < 500 && !is_same(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      EXPECT_TRUE(is_same());
    }
  }

  Leader leader_;
  std::vector<std::unique_ptr<Following>> following_;
  std::vector<std::unique_ptr<group::ThreadGroup>> epochs_;
};

std::vector<TokenId> prompt_of(int32_t length, TokenId first) {
  std::vector<TokenId> prompt;
  for (int32_t i = 0; i < length; ++i) prompt.push_back(static_cast<TokenId>((first + 7 * i) % FakeModel::kVocab));
  return prompt;
}

TEST_F(FollowerTest, FollowersComputeEveryBatch) {
  for (TokenId i = 0; i < 6; ++i) expect_answer(prompt_of(5 + 6 * i, i), 9);
  for (const auto& each : following_) EXPECT_GT(each->steps, 40);
  expect_same_caches();
}

TEST_F(FollowerTest, ANewEpochForgetsPrefixes) {
  const std::vector<TokenId> prompt = prompt_of(24, 3);
  expect_answer(prompt, 4);
  expect_same_caches();
  lose();
  // As if the follower's process had begun anew. Both caches, so that they can be compared.
  for (const auto& each : following_) std::memset(each->cache.base(), 0, static_cast<size_t>(each->cache.bytes()));
  form();
  expect_answer(prompt, 4);
  for (const auto& each : following_) {
    const std::span<const int32_t> stored(reinterpret_cast<const int32_t*>(each->cache.base()),
                                          static_cast<size_t>(each->cache.bytes()) / sizeof(int32_t));
    const auto has_first_block = [&] {
      return std::search(stored.begin(), stored.end(), prompt.begin(), prompt.begin() + 4) != stored.end();
    };
    // The follower may be behind its leader, which has answered already.
    for (int i = 0; i < 500 && !has_first_block(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    EXPECT_TRUE(has_first_block()) << "the first block of the prompt was not computed again";
  }
}

}  // namespace
}  // namespace tandem::engine
