// One engine rank, put together from the options of `tandem serve`: device, model, KV cache, transfer agent, engine.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "src/base/clock.h"
#include "src/base/kv_transfer_config.h"
#include "src/base/metrics.h"
#include "src/base/options.h"
#include "src/base/result.h"
#include "src/commands/expert_load_file.h"
#include "src/commands/rank_options.h"
#include "src/engine/engine.h"
#include "src/engine/follower.h"
#include "src/engine/lockstep.h"
#include "src/engine/memory_plan.h"
#include "src/ep/balancer.h"
#include "src/ep/exchange.h"
#include "src/group/fabric_users.h"
#include "src/group/membership.h"
#include "src/kernels/ops.h"
#include "src/model/config.h"
#include "src/model/model.h"
#include "src/tp/order_stream.h"
#include "src/tp/tensor_windows.h"
#include "src/transfer/agent.h"

namespace tandem::commands {

struct RankConfig {
  std::string backend;  // as for kernels::make_ops
  int threads = 0;
  model::LoadOptions load;
  model::ModelConfig model;
  engine::SchedulerLimits limits;
  engine::MemoryRequest memory;
  bool first_token_from_decode = false;
  SpanSink* spans = nullptr;  // outlives the rank
  std::optional<KvTransferConfig> kv_transfer;
  comm::Transport kv_transport = comm::Transport::kAuto;
  transfer::KvChecksum kv_checksum = transfer::KvChecksum::kAuto;
  std::string model_name;
  std::optional<GroupConfig> group;  // this rank has its shard of the experts
  std::string expert_load_path;  // of --record-expert-load; "": no recording
  double expert_load_interval_s = 10;
  // Told from the loading thread before any weight is read; may be empty.
  std::function<void(const PlannedCache&)> on_planned;
};

// Reads and cross-checks the options and config.json; nothing is loaded or opened yet.
Result<RankConfig> make_rank_config(const Options& options);

class Rank {
 public:
  // Loads the weights: seconds to minutes. `on_progress` is called with 0 once every header was found good, then up
  // to 1. `sampled_vocab` is the number of ids the tokenizer knows. The engine is not started.
  static Result<std::unique_ptr<Rank>> load(RankConfig config, int64_t sampled_vocab, const Clock& clock,
                                            Registry& registry, std::function<void(double)> on_progress);
  ~Rank();

  // Before the engine starts, with a group: from now on this rank waits for the others. `http_address` is where the front
  // end of the group finds this rank's endpoint.
  Status join_group(const std::string& http_address, Registry& registry);
  // Why requests cannot be computed now; ok without a group.
  Status group_status() const;

  // Starts what computes; after join_group().
  void start();
  void stop();

  // Not of a follower.
  engine::Engine& engine() { return *engine_; }
  const kernels::Ops& ops() const { return *ops_; }
  const model::ModelInfo& info() const { return model_->info(); }
  // Null unless loads are recorded.
  const engine::ExpertLoadRecorder* expert_load() const { return expert_load_.get(); }
  // Null unless this rank balances the experts of its group; see ep::Balancer::load_report.
  const ep::Balancer* balancer() const { return balancer_.get(); }

 private:
  Rank() = default;
  Status load_weights(const RankConfig& config);
  Status open_whole_cache(const RankConfig& config, const model::KvLayout& part, int64_t num_blocks);
  void make_cache(const RankConfig& config, int64_t num_blocks);
  Status make_engine(const RankConfig& config, int64_t sampled_vocab, const Clock& clock, Registry& registry);
  void make_tensor_rank(const GroupConfig& config);
  Status open_agent(const RankConfig& config);
  Status record_expert_load(const RankConfig& config, Registry& registry);
  std::vector<group::Fact> group_facts() const;

  // In order of dependence; the agent goes before the cache that it reads and writes.
  RankConfig config_;
  std::unique_ptr<kernels::Ops> ops_;
  std::unique_ptr<ep::Exchange> exchange_;
  std::optional<ep::BalancerOptions> balancing_;
  std::unique_ptr<tp::TensorWindows> tensor_;  // null without tensor parallelism
  std::unique_ptr<model::Model> model_;
  std::unique_ptr<model::KvCache> whole_cache_;  // the KV of all tensor ranks, if it is one memory; null otherwise
  std::unique_ptr<model::KvCache> cache_;        // this rank's: a part of that, or all there is
  std::unique_ptr<kv::Populator> populator_;
  std::unique_ptr<engine::ExpertLoadRecorder> expert_load_;
  std::unique_ptr<group::Membership> membership_;
  std::unique_ptr<ep::Balancer> balancer_;
  std::unique_ptr<tp::OrderSender> order_sender_;      // of the first tensor rank
  std::unique_ptr<tp::OrderReceiver> order_receiver_;  // of the others
  std::unique_ptr<group::FabricUsers> fabric_users_;
  std::unique_ptr<engine::Lockstep> lockstep_;
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<engine::Follower> follower_;
  std::unique_ptr<ExpertLoadFile> expert_load_file_;
  std::unique_ptr<transfer::Agent> agent_;
};

}  // namespace tandem::commands
