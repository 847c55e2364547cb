// The engine of one rank: one thread owns the scheduler, the block pool and every sequence, and runs the step loop.
// README.md in this folder is the contract (ownership, invariants, life of a request).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <variant>
#include <vector>

#include "src/base/clock.h"
#include "src/base/kv_transfer_config.h"
#include "src/comm/bell.h"
#include "src/engine/dual_batch.h"
#include "src/engine/expert_load.h"
#include "src/engine/lockstep.h"
#include "src/engine/probe.h"
#include "src/engine/scheduler.h"
#include "src/engine/step_log.h"
#include "src/engine/worker.h"
#include "src/kv/block_pool.h"
#include "src/kv/populator.h"
#include "src/model/model.h"
#include "src/tp/order_stream.h"
#include "src/transfer/agent.h"

namespace tandem::engine {

struct EngineOptions {
  std::string model_name;
  SchedulerLimits limits;
  std::vector<TokenId> eos_ids;
  int64_t sampled_vocab = 0;       // ids the tokenizer knows; padded rows of the head above it are never chosen
  KvRole kv_role = KvRole::kBoth;  // which legs this engine takes, once an agent is attached
  std::string kv_host;             // address peers use to reach this engine's agent
  bool first_token_from_decode = false;  // compute the first token of a pushed prompt here, though prefill sent it
  DualBatchLimits dual_batch;
  SpanSink* spans = nullptr;             // null: stages are not traced
  std::optional<float> synthetic_fill;   // make the KV of prompts up, to measure decode alone (KvCache::fill)
};

class Engine final : public Worker {
 public:
  // `registry` must outlive the engine; `model` and `cache` belong to the engine thread once start() was called.
  Engine(model::Model& model, model::KvCache& cache, EngineOptions options, const Clock& clock, Registry& registry);
  ~Engine() override;

  // The agent calls wake() when it has news; set before start(). Null without prefill/decode.
  void attach(transfer::Agent* agent) { agent_ = agent; }
  // Gets every step's routing; set before start(). The model must keep it (model::LoadOptions::keep_routing).
  void attach(ExpertLoadRecorder* recorder) { expert_load_ = recorder; }
  // This engine is one rank of a group and steps together with the others; set before start().
  void attach(Lockstep* lockstep);
  // This engine is the first of several tensor ranks: the others (Follower) compute what it sends. With a Lockstep that
  // attaches `orders` to the fabric; set before start().
  void attach(tp::OrderSender* orders) { orders_ = orders; }
  // Is told how much of the cache is in use; set before start().
  void attach(kv::Populator* populator) { populator_ = populator; }
  void wake();

  void start();
  // One turn of the step loop, for a simulation instead of start(): what the thread does between two looks at its
  // clock. kIdle: there was nothing to compute; kStopped: stop() was called.
  enum class Turn : uint8_t { kWorked, kIdle, kStopped };
  Turn run_once();
  // Ends every request with kUnavailable and joins the thread.
  void stop();

  RequestId submit(TokenRequest request, EventSink sink) override;
  void cancel(RequestId id) override;
  void release(const transfer::KvTransferParams& publication) override;

  // The state of the engine thread: for that thread, or for tests and simulations while there is none.
  const kv::BlockPool& pool() const { return pool_; }
  const Scheduler& scheduler() const { return scheduler_; }
  int64_t num_open_transfers() const { return std::ssize(transfers_); }
  // The last steps, for any thread.
  const StepLog& step_log() const { return step_log_; }

 private:
  struct Submit {
    RequestId id;
    TokenRequest request;
    EventSink sink;
  };
  struct Cancel {
    RequestId id;
  };
  struct Release {
    std::string engine_id;
    std::string handle;
  };
  using Command = std::variant<Submit, Cancel, Release>;
  // Blocks that an open transfer may read or write, pinned until its Done.
  struct OpenTransfer {
    std::vector<BlockId> blocks;
    RequestId sequence;  // may be gone already
    std::string external_id;
    bool sending = false;
    int64_t lent_blocks = 0;  // of a publication whose sequence has ended
  };

  void run();
  bool receive_commands();
  void fail_all(const Error& why);
  bool join_round(const StepPlan& plan);
  void enter_group();
  Status send_order();
  void wait_for_group();
  void lose_group(const Error& why);
  void wait_for_work();
  bool has_news();
  void collect_transfers();
  void expire_deadlines();
  void renew_leases();
  void decline(const TokenRequest& request);
  void release(const Release& publication);
  void begin_transfers(const StepPlan& plan);
  Result<int64_t> compute(const StepPlan& plan);
  void push_layer(const StepPlan& plan, int64_t layer);
  void take_results(const StepPlan& plan);
  void log_step(const StepPlan& plan, int64_t compute_us);

  void accept(Submit submit);
  Status check_request(const TokenRequest& request) const;
  Status check_room(TransferRole role, int64_t prompt_tokens) const;
  Result<TransferRole> choose_role(const TokenRequest& request) const;
  void take_token(Sequence& sequence, size_t logit_index);
  void append_token(Sequence& sequence, GeneratedToken token);
  std::optional<FinishReason> finish_reason(const Sequence& sequence) const;
  void finish(Sequence& sequence, TokenEvent event);
  void fail(Sequence& sequence, Error error);
  void drop(RequestId id);
  transfer::TransferId open_transfer(Sequence& sequence, std::vector<BlockId> blocks, bool sending);
  transfer::KvTransferParams publish(Sequence& sequence);
  void finish_transfer(const transfer::Done& done);
  void finish_receive(Sequence& sequence, const transfer::Done& done);
  void start_received(Sequence& sequence, int64_t num_computed);
  void finish_send(Sequence& sequence, const transfer::Done& done);
  TokenUsage usage(const Sequence& sequence) const;
  void trace_stages(const Sequence& sequence, const std::string& error) const;
  std::vector<BlockId> prompt_blocks(const Sequence& sequence, int64_t first_block) const;
  void update_gauges();

  model::Model& model_;
  model::KvCache& cache_;
  const EngineOptions options_;
  const Clock& clock_;
  Probe probe_;
  transfer::Agent* agent_ = nullptr;
  ExpertLoadRecorder* expert_load_ = nullptr;
  Lockstep* lockstep_ = nullptr;
  tp::OrderSender* orders_ = nullptr;
  kv::Populator* populator_ = nullptr;

  // Shared with other threads.
  alignas(comm::Bell::kBytes) std::array<std::byte, comm::Bell::kBytes> bell_memory_{};
  comm::Bell own_bell_{bell_memory_.data()};
  comm::Bell* bell_ = &own_bell_;  // rung when there is news; that of the group, if there is one
  std::mutex mutex_;
  std::vector<Command> commands_;
  bool woken_ = false;
  bool stopping_ = false;
  uint64_t next_request_ = 1;

  // Owned by the engine thread.
  kv::BlockPool pool_;
  Scheduler scheduler_;
  model::Batch batch_;
  bool has_group_ = false;  // an epoch stood when last looked at
  group::Epoch epoch_;      // which
  tp::CacheNews news_;      // for the other tensor ranks, since the last step
  int64_t round_rows_ = 0;  // of all ranks of the group in this step; 0 without a group
  bool is_split_ = false;   // this step has two parts
  StepTimes step_times_;    // of the running step
  StepLog step_log_;
  std::unordered_map<transfer::TransferId, OpenTransfer> transfers_;
  uint64_t next_transfer_ = 1;
  int64_t leases_renewed_us_ = 0;
  std::thread thread_;
};

}  // namespace tandem::engine
