// The scheduler alone: no model, no threads. A "step" is plan, commit, advance, and one more token for every sequence
// whose last row was computed.
#include "src/engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

namespace tandem::engine {
namespace {

class SchedulerTest : public testing::Test {
 protected:
  void init(int64_t num_blocks, SchedulerLimits limits) {
    limits_ = limits;
    pool_ = std::make_unique<kv::BlockPool>(num_blocks);
    scheduler_ = std::make_unique<Scheduler>(limits, *pool_);
  }

  RequestId add(std::vector<TokenId> prompt, TransferRole role = TransferRole::kNone, const std::string& salt = "") {
    TokenRequest request;
    request.prompt = std::move(prompt);
    request.cache_salt = salt;
    const RequestId id(next_id_++);
    std::unique_ptr<Sequence> sequence = std::make_unique<Sequence>(
        id, std::move(request), [](TokenEvent&&) {}, limits_.block_size);
    sequence->role = role;
    EXPECT_TRUE(scheduler_->add(std::move(sequence)));
    return id;
  }

  StepPlan step() {
    const StepPlan plan = scheduler_->plan();
    check_plan(plan);
    scheduler_->commit(plan);
    for (const ScheduledRows& rows : plan.rows) {
      const Sequence& sequence = *scheduler_->find(rows.id);
      EXPECT_GE(static_cast<int64_t>(sequence.blocks.size()) * limits_.block_size,
                rows.first_position + rows.num_tokens);
    }
    scheduler_->advance(plan);
    for (const ScheduledRows& rows : plan.rows) {
      if (rows.wants_logits)
        scheduler_->find(rows.id)->tokens.push_back(
            static_cast<TokenId>(1000 + scheduler_->find(rows.id)->length() % 7));
    }
    pool_->check_integrity();
    return plan;
  }

  void check_plan(const StepPlan& plan) {
    int64_t tokens = 0;
    for (const ScheduledRows& rows : plan.rows) {
      tokens += rows.num_tokens;
      EXPECT_GT(rows.num_tokens, 0);
      const Sequence& sequence = *scheduler_->find(rows.id);
      const int64_t end = rows.first_position + rows.num_tokens;
      EXPECT_TRUE(end <= sequence.prompt_length || rows.first_position >= sequence.prompt_length)
          << "a chunk crosses the end of the prompt";
    }
    EXPECT_LE(tokens, limits_.max_num_batched_tokens);
    EXPECT_LE(static_cast<int64_t>(plan.rows.size()), limits_.max_num_seqs);
  }

  static std::vector<TokenId> range(TokenId first, int count) {
    std::vector<TokenId> tokens;
    for (int i = 0; i < count; ++i) tokens.push_back(first + i);
    return tokens;
  }

  SchedulerLimits limits_;
  std::unique_ptr<kv::BlockPool> pool_;
  std::unique_ptr<Scheduler> scheduler_;
  uint64_t next_id_ = 1;
};

SchedulerLimits small(int64_t batched_tokens, int64_t seqs) {
  SchedulerLimits limits;
  limits.max_num_batched_tokens = batched_tokens;
  limits.max_num_seqs = seqs;
  limits.block_size = 4;
  return limits;
}

TEST_F(SchedulerTest, LongPromptIsChunkedAndDecodeGoesFirst) {
  init(64, small(8, 4));
  const RequestId first = add(range(0, 3));
  EXPECT_EQ(step().rows.size(), 1U);
  const RequestId second = add(range(100, 20));
  StepPlan plan = step();
  ASSERT_EQ(plan.rows.size(), 2U);
  EXPECT_EQ(plan.rows[0].id, first);
  EXPECT_EQ(plan.rows[0].num_tokens, 1);
  EXPECT_EQ(plan.rows[1].id, second);
  EXPECT_EQ(plan.rows[1].num_tokens, 7);
  EXPECT_FALSE(plan.rows[1].wants_logits);
  plan = step();
  EXPECT_EQ(plan.rows[1].first_position, 7);
  plan = step();
  EXPECT_EQ(plan.rows[1].num_tokens, 6);
  EXPECT_TRUE(plan.rows[1].wants_logits);
}

TEST_F(SchedulerTest, PrefixHitLeavesAtLeastOneToken) {
  init(64, small(64, 4));
  const RequestId first = add(range(0, 8));
  step();
  scheduler_->remove(first);
  const RequestId same = add(range(0, 8));
  StepPlan plan = step();
  ASSERT_EQ(plan.admitted.size(), 1U);
  EXPECT_EQ(plan.admitted[0].cached_blocks, 1);  // the block with the last token is computed again
  EXPECT_EQ(plan.rows[0].first_position, 4);
  EXPECT_EQ(scheduler_->find(same)->cached_tokens, 4);
  const RequestId longer = add(range(0, 9));
  plan = step();
  EXPECT_EQ(scheduler_->find(longer)->cached_tokens, 8);
  add(range(0, 9), TransferRole::kNone, "salt");
  plan = step();
  EXPECT_EQ(plan.admitted[0].cached_blocks, 0);
}

TEST_F(SchedulerTest, GeneratedBlocksAreSharedOnlyWhenRolesDoNotMatter) {
  for (const bool rows_depend_on_role : {false, true}) {
    SchedulerLimits limits = small(64, 4);
    limits.rows_depend_on_role = rows_depend_on_role;
    init(64, limits);
    const RequestId first = add(range(0, 4));
    for (int i = 0; i < 6; ++i) step();
    std::vector<TokenId> conversation = scheduler_->find(first)->tokens;
    scheduler_->remove(first);
    add(conversation);
    const StepPlan plan = step();
    EXPECT_EQ(plan.admitted[0].cached_blocks, rows_depend_on_role ? 1 : 2);
  }
}

TEST_F(SchedulerTest, PreemptsTheLatestArrivalAndResumesIt) {
  SchedulerLimits limits = small(64, 4);
  limits.prefix_caching = false;  // so that the second one has everything to compute again
  init(6, limits);
  const RequestId first = add(range(0, 8));
  const RequestId second = add(range(100, 8));
  step();
  bool preempted = false;
  for (int i = 0; i < 40 && !preempted; ++i) {
    const StepPlan plan = step();
    for (RequestId id : plan.preempted) {
      EXPECT_EQ(id, second);
      preempted = true;
    }
  }
  ASSERT_TRUE(preempted);
  EXPECT_EQ(scheduler_->num_waiting(), 1);
  const std::vector<TokenId> tokens = scheduler_->find(second)->tokens;
  scheduler_->remove(first);
  StepPlan plan = step();
  EXPECT_EQ(plan.admitted[0].id, second);
  EXPECT_LE(plan.rows[0].first_position + plan.rows[0].num_tokens, 8);  // prompt rows first
  plan = step();
  EXPECT_GE(plan.rows[0].first_position, 8);  // then generated rows, all at once
  EXPECT_EQ(plan.rows[0].first_position + plan.rows[0].num_tokens, static_cast<int64_t>(tokens.size()));
}

TEST_F(SchedulerTest, OneSequenceAloneIsNeverPreempted) {
  init(4, small(64, 4));
  add(range(0, 4));
  for (int i = 0; i < 12; ++i) EXPECT_TRUE(step().preempted.empty());
}

TEST_F(SchedulerTest, SequencesWithAnOpenTransferKeepTheirBlocks) {
  init(6, small(64, 4));
  const RequestId first = add(range(0, 8));
  const RequestId sender = add(range(100, 8), TransferRole::kPushSend);
  step();
  scheduler_->find(sender)->transfer = transfer::TransferId(1);
  for (int i = 0; i < 30; ++i) {
    const StepPlan plan = step();
    for (RequestId id : plan.preempted) EXPECT_EQ(id, first);
  }
  EXPECT_NE(scheduler_->find(sender)->state, SequenceState::kWaiting);
}

TEST_F(SchedulerTest, ReceiverHoldsAllBlocksAndIsNotComputed) {
  init(64, small(4, 4));
  const RequestId receiver = add(range(0, 10), TransferRole::kPushReceive);
  StepPlan plan = step();
  ASSERT_EQ(plan.admitted.size(), 1U);
  EXPECT_TRUE(plan.rows.empty());
  EXPECT_EQ(scheduler_->find(receiver)->blocks.size(), 3U);
  EXPECT_TRUE(step().empty());
  scheduler_->start_received(*scheduler_->find(receiver), 10);
  scheduler_->find(receiver)->role = TransferRole::kNone;
  scheduler_->find(receiver)->tokens.push_back(5);
  plan = step();
  ASSERT_EQ(plan.rows.size(), 1U);
  EXPECT_EQ(plan.rows[0].first_position, 10);
}

// What waits for another worker leaves room for what ends the waiting of that worker, and does not keep it back.
TEST_F(SchedulerTest, ReservationsLeaveRoomForSends) {
  SchedulerLimits limits = small(64, 8);
  limits.room_blocks = 4;
  init(10, limits);
  const RequestId first = add(range(0, 8), TransferRole::kPushReceive);     // 3 of the 6 blocks that may wait
  const RequestId second = add(range(100, 12), TransferRole::kPushReceive);  // would make 7
  const RequestId third = add(range(200, 4), TransferRole::kPullPublish);   // 2, but comes later
  const RequestId send = add(range(300, 12), TransferRole::kPushSend);
  StepPlan plan = step();
  ASSERT_EQ(plan.admitted.size(), 3U);
  EXPECT_EQ(plan.admitted[0].id, first);
  EXPECT_EQ(plan.admitted[1].id, third);
  EXPECT_EQ(plan.admitted[2].id, send);
  EXPECT_EQ(scheduler_->num_waiting(), 1);
  scheduler_->remove(first);
  scheduler_->remove(send);
  ASSERT_EQ(step().admitted.size(), 1U);
  EXPECT_EQ(scheduler_->find(second)->state, SequenceState::kReceiving);
  EXPECT_TRUE(scheduler_->has_room(TransferRole::kPushReceive, 23));
  EXPECT_FALSE(scheduler_->has_room(TransferRole::kPullPublish, 24));
  EXPECT_TRUE(scheduler_->has_room(TransferRole::kPullReceive, 15));
  EXPECT_FALSE(scheduler_->has_room(TransferRole::kPushSend, 16));
  EXPECT_TRUE(scheduler_->has_room(TransferRole::kNone, 40));
  for (const RequestId id : {second, third}) scheduler_->remove(id);
  EXPECT_EQ(pool_->num_available(), 10);
}

// A prompt of this worker's own that needs more than the room waits until what waits is gone; sends pass it, nothing
// else does.
TEST_F(SchedulerTest, OnlySendsPassWhatIsHeldUpByReservations) {
  SchedulerLimits limits = small(64, 8);
  limits.room_blocks = 4;
  init(10, limits);
  const RequestId reserved = add(range(0, 16), TransferRole::kPushReceive);  // 5
  EXPECT_EQ(step().admitted.size(), 1U);
  const RequestId own = add(range(100, 24));  // 7
  const RequestId small_own = add(range(200, 4));
  const RequestId fetch = add(range(300, 8), TransferRole::kPullReceive);
  StepPlan plan = step();
  ASSERT_EQ(plan.admitted.size(), 1U);
  EXPECT_EQ(plan.admitted[0].id, fetch);
  scheduler_->remove(reserved);
  scheduler_->remove(fetch);
  plan = step();
  ASSERT_EQ(plan.admitted.size(), 2U);
  EXPECT_EQ(plan.admitted[0].id, own);
  EXPECT_EQ(plan.admitted[1].id, small_own);
}

TEST_F(SchedulerTest, WaitingQueueIsBounded) {
  SchedulerLimits limits = small(4, 1);
  limits.max_num_waiting = 2;
  init(64, limits);
  add(range(0, 4));
  add(range(0, 4));
  TokenRequest request;
  request.prompt = range(0, 4);
  EXPECT_FALSE(scheduler_->add(std::make_unique<Sequence>(
      RequestId(99), request, [](TokenEvent&&) {}, 4)));
}

// Random arrivals, ends and cancels over a pool that is too small; everything must finish and every block come back.
TEST_F(SchedulerTest, RandomLoadFinishesAndConservesBlocks) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const auto below = [&random](unsigned bound) { return static_cast<int>(random() % bound); };
  SchedulerLimits limits = small(16, 6);
  limits.rows_depend_on_role = below(2) == 0;
  init(24, limits);
  std::map<uint64_t, int64_t> wanted;  // id → final length
  int finished = 0;
  int idle_steps = 0;
  for (int i = 0; i < 20000 && (i < 2000 || !wanted.empty()); ++i) {
    if (i < 2000 && below(3) == 0) {
      const RequestId id = add(range(below(3) * 10, 1 + below(40)));
      wanted[id.value] = scheduler_->find(id)->length() + 1 + below(40);
    }
    if (below(50) == 0 && !wanted.empty()) {
      scheduler_->remove(RequestId(wanted.begin()->first));
      wanted.erase(wanted.begin());
    }
    const StepPlan plan = step();
    idle_steps = plan.empty() && !wanted.empty() ? idle_steps + 1 : 0;
    ASSERT_LT(idle_steps, 2) << "stuck";
    for (const ScheduledRows& rows : plan.rows) {
      if (rows.wants_logits && scheduler_->find(rows.id)->length() >= wanted.at(rows.id.value)) {
        scheduler_->remove(rows.id);
        wanted.erase(rows.id.value);
        ++finished;
      }
    }
  }
  EXPECT_TRUE(wanted.empty());
  EXPECT_GT(finished, 100);
  EXPECT_EQ(pool_->num_available(), pool_->num_blocks());
}

}  // namespace
}  // namespace tandem::engine
