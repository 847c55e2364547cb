// Decides what each step computes. plan() is a pure function of the state; commit() makes it so.
//
// Policy: first every stream (a running sequence that generates, one row each), then running sequences with more rows
// to compute (prompts, and answers taken up again after a preemption) in order of arrival, then waiting sequences first
// come first served, all within max_num_batched_tokens rows and max_num_seqs sequences. While there are streams, the
// others' rows are also limited by time (step_budget.h), so that no stream waits longer than max_step_us or so. When
// blocks run out, the running sequence that arrived last gives its blocks back and waits again (preemption by
// recompute); its prompt blocks usually still stand in the prefix cache when it returns.
//
// A chunk never crosses the end of the prompt (see model::Chunk for why).
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "src/base/ids.h"
#include "src/engine/sequence.h"
#include "src/engine/step_budget.h"
#include "src/kv/block_pool.h"

namespace tandem::engine {

struct SchedulerLimits {
  int64_t max_num_batched_tokens = 512;
  int64_t max_num_seqs = 64;
  int64_t max_num_waiting = 1024;
  int64_t max_step_us = 0;  // of a step with streams; 0: no limit
  int64_t block_size = 16;
  bool prefix_caching = true;
  // KV of generated tokens must not serve another request's prompt (model::ModelInfo::rows_depend_on_role).
  bool rows_depend_on_role = false;
  // Of a worker that takes both legs: blocks that sequences whose KV waits for another worker (reservations of a push,
  // publications of a pull) leave to all others, and with them a seat. Two such workers could else wait for each other
  // with all their blocks. 0: as the role needs it (Engine); negative: there is no such limit.
  int64_t room_blocks = 0;
};

// Rows [first_position, first_position + num_tokens) of one running sequence.
struct ScheduledRows {
  RequestId id;
  int64_t first_position = 0;
  int64_t num_tokens = 0;
  bool wants_logits = false;
  bool is_stream = false;  // the next row of an answer in progress
};

// A waiting sequence that gets blocks: `cached_blocks` from the prefix cache and the rest new, `total_blocks` in all.
struct Admission {
  RequestId id;
  int64_t cached_blocks = 0;
  int64_t total_blocks = 0;
};

struct StepPlan {
  std::vector<RequestId> preempted;  // give back their blocks first
  std::vector<Admission> admitted;   // then these get theirs
  std::vector<ScheduledRows> rows;   // then these are computed, growing their blocks as needed

  bool empty() const { return preempted.empty() && admitted.empty() && rows.empty(); }
};

class Scheduler {
 public:
  Scheduler(const SchedulerLimits& limits, kv::BlockPool& pool)
      : limits_(limits), pool_(pool), budget_(limits.max_step_us) {}

  const SchedulerLimits& limits() const { return limits_; }

  // A new sequence joins the end of the waiting queue. False if the queue is full.
  bool add(std::unique_ptr<Sequence> sequence);
  StepPlan plan() const;
  // Moves blocks and sequences as planned. Admitted receivers become kReceiving, others kRunning.
  void commit(const StepPlan& plan);
  // After the step: the rows are computed; full blocks are offered to the prefix cache.
  void advance(const StepPlan& plan);
  // Other ranks of the group generate answers, whose next tokens wait for this rank's steps as well: they are limited as
  // if the streams were here.
  void set_streams_elsewhere(bool streams) { streams_elsewhere_ = streams; }
  // How long the planned step took: later plans reckon with it.
  void learn(const StepPlan& plan, int64_t step_us);
  // A receiver has its prompt's KV up to `num_computed` tokens and starts running.
  void start_received(Sequence& sequence, int64_t num_computed);
  // Stops computing a running sequence that waits for its transfer.
  void park_sending(Sequence& sequence);
  // Blocks without a sequence wait for another worker from now on (a publication), or no longer if negative.
  void lend(int64_t num_blocks) { waiting_blocks_ += num_blocks; }
  // With a limit (room_blocks): can a transfer of `role` for a sequence of this length ever take place here?
  bool has_room(TransferRole role, int64_t prompt_tokens) const;
  // Releases the sequence's blocks and forgets it. The caller still owns any open transfer's pins.
  std::unique_ptr<Sequence> remove(RequestId id);

  Sequence* find(RequestId id);
  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t num_receiving() const { return num_receiving_; }
  int64_t num_sequences() const { return static_cast<int64_t>(sequences_.size()); }
  const std::unordered_map<RequestId, std::unique_ptr<Sequence>>& sequences() const { return sequences_; }

  int64_t blocks_for(int64_t num_tokens) const { return (num_tokens + limits_.block_size - 1) / limits_.block_size; }

 private:
  struct Draft;
  void plan_running(Draft& draft) const;
  void plan_waiting(Draft& draft) const;
  bool plan_rows(Draft& draft, const Sequence& sequence) const;
  bool ends_some_waiting() const;
  int64_t rows_in_budget(const Draft& draft, int64_t position) const;
  void take_from_budget(Draft& draft, const ScheduledRows& rows) const;
  bool make_room(Draft& draft, const Sequence& sequence, int64_t blocks_needed) const;
  int64_t count_cached_blocks(const Sequence& sequence) const;
  int64_t shareable_tokens(const Sequence& sequence) const;
  void preempt(Sequence& sequence);
  void hold_cached(const Admission& admission);
  void admit(const Admission& admission);
  void register_prefixes(Sequence& sequence);
  void end_receiving(Sequence& sequence);
  void count_waiting(Sequence& sequence, int64_t num_blocks);
  Sequence& get(RequestId id);
  const Sequence& get(RequestId id) const;

  SchedulerLimits limits_;
  kv::BlockPool& pool_;
  StepBudget budget_;
  bool streams_elsewhere_ = false;
  std::unordered_map<RequestId, std::unique_ptr<Sequence>> sequences_;
  std::deque<RequestId> waiting_;
  std::vector<RequestId> running_;  // in order of arrival: kRunning only
  int64_t num_receiving_ = 0;
  int64_t num_sending_ = 0;
  int64_t num_reserved_ = 0;    // of the receiving ones: reservations of a push
  int64_t waiting_blocks_ = 0;  // of reservations and publications; those they share count for each
};

}  // namespace tandem::engine
