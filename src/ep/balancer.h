// Keeps the load of a group's experts even while it works (--enable-eplb): counts where rows go, now and then computes a
// better placement, and moves experts there, a chunk with every round of the group.
//
//   count ──interval──> gather ──> plan ──> announce ──> move layer by layer ──> count
//           every rank's counts    rank 0, on a thread   weights and map of a layer switch together, on all ranks
//           go to rank 0           of its own            before the same step
//
// Between rebalances rank 0 also gathers the sum of the window from time to time, to show it (load_report).
//
// All ranks are in the same phase in the same round: each change follows from the round's number, from what all have
// exchanged, or from rank 0's intent. Copies of an expert are equal, so answers do not depend on where it is.
//
// A rank that comes back after a loss begins with the experts of the start. The first thing in a new epoch is therefore to
// agree on a placement again: the newest one, and whoever holds something else reads those experts from its files.
//
// Belongs to the engine thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "src/base/metrics.h"
#include "src/ep/chunk_channel.h"
#include "src/ep/exchange.h"
#include "src/eplb/config.h"
#include "src/eplb/load_report.h"
#include "src/eplb/load_window.h"
#include "src/eplb/moves.h"
#include "src/eplb/placement.h"
#include "src/group/step_agreement.h"
#include "src/model/expert_store.h"

namespace tandem::ep {

struct BalancerOptions {
  eplb::EplbConfig config;
  // Passed check_layout. The number of nodes is found anew in each epoch: ranks that map each other's windows are on one.
  eplb::Layout layout;
  std::vector<int64_t> layers;  // with routed experts, as indices in the model: names of metrics
  int64_t window_offset = 0;  // where its part of the windows begins
  int64_t chunk_bytes = 1 << 18;
};

class Balancer final : public group::RoundUser {
 public:
  static int64_t window_bytes(const BalancerOptions& options) {
    return ChunkChannel::window_bytes(static_cast<int32_t>(options.layout.num_ranks), options.chunk_bytes);
  }
  // The experts that `rank` holds at start.
  static model::ExpertShard initial_shard(const eplb::Layout& layout, int32_t rank);

  // All outlive this; `exchange` has the initial shard and is prepared. Only rank 0 has all metrics.
  Balancer(const BalancerOptions& options, Exchange& exchange, model::ExpertStore& store, Registry& registry);
  ~Balancer() override;

  Status begin_epoch(group::Fabric& fabric, group::StepAgreement& agreement) override;
  Status before_round(group::Fabric& fabric, group::StepIntent& mine) override;
  Status after_round(group::Fabric& fabric, std::span<const group::StepIntent> intents) override;

  int64_t carried_bytes() const override { return channel_.carried_bytes(); }

  const eplb::Placement& placement() const { return placement_; }
  // Layers that have been switched so far, since the start of the group.
  uint64_t version() const { return version_; }
  int64_t num_nodes() const { return layout_.num_nodes; }
  // Between two gatherings of what is only shown. Each puts one sum of counts per rank: 58 layers of 256 experts are 58 KiB.
  static constexpr int64_t kStepsPerReport = 64;
  // Rank 0: what the group did in the last window that was gathered; null before the first. From any thread.
  std::shared_ptr<const eplb::LoadReport> load_report() const;

 private:
  enum class Phase : uint8_t { kCount, kReport, kGather, kPlan, kAnnounce, kMove };
  // Mean / max of the ranks' tokens.
  struct BalanceGauges {
    Gauge* overall = nullptr;
    Gauge* p50 = nullptr;
    Gauge* p99 = nullptr;
    Gauge* worst = nullptr;
    void set(const eplb::BalanceReport& balance) const;
  };
  struct Incoming {
    eplb::Move move;
    model::ExpertMemory memory;  // spare, being filled
  };

  void count_step();
  void start_report();
  void start_gather();
  void gather(Phase phase);
  eplb::ExpertLoad sum_gathered();
  void take_counts(size_t source, int64_t offset, std::span<const std::byte> in);
  void start_planning();
  void plan(std::vector<eplb::LoadSeries> ranks);
  void start_announcing(int32_t from, const eplb::Placement& placement);
  Status take_announcement();
  void start_layer(int64_t layer);
  void commit_layer();
  void fill(size_t index, int64_t offset, std::span<std::byte> out);
  void take(size_t index, int64_t offset, std::span<const std::byte> in);
  Status adopt(group::Fabric& fabric, const eplb::Placement& newest);
  void use_map(int64_t layer);
  void copy_expert(const model::ExpertMemory& memory, int64_t layer, int64_t offset, std::span<std::byte> out) const;
  void write_expert(const model::ExpertMemory& memory, int64_t layer, int64_t offset,
                    std::span<const std::byte> in) const;
  int64_t num_layers() const { return store_.num_layers(); }
  int64_t table_bytes() const;
  int32_t num_ranks() const { return static_cast<int32_t>(options_.layout.num_ranks); }
  bool is_hierarchical() const {
    return options_.config.policy == eplb::Policy::kDefault && layout_.is_hierarchical();
  }
  void find_nodes(std::span<const group::StepIntent> intents);
  void register_metrics(Registry& registry);
  void report_plan(const eplb::ExpertLoad& load, const eplb::Placement& next);
  void show(const eplb::ExpertLoad& load, std::optional<eplb::BalanceReport> planned);

  const BalancerOptions options_;
  eplb::Layout layout_;  // with the nodes of this epoch
  Exchange& exchange_;
  model::ExpertStore& store_;
  const int32_t rank_;
  eplb::Placement placement_;  // as committed
  uint64_t version_ = 0;
  ChunkChannel channel_;

  Phase phase_ = Phase::kCount;
  bool is_synchronizing_ = false;
  int64_t steps_ = 0;  // of this epoch
  int64_t next_rebalance_ = 0;
  int64_t next_report_ = 0;
  int32_t first_of_node_ = 0;
  int64_t gathered_steps_ = 0;  // of the window that was gathered last
  eplb::ExpertLoad step_load_;
  eplb::LoadWindow window_;
  std::vector<std::byte> outgoing_;               // counts, or an announced table
  std::vector<std::vector<std::byte>> gathered_;  // rank 0: counts of each rank
  std::vector<std::byte> table_;                  // an announced placement, as it comes in

  // Of rank 0's planner, which owns them while is_planned_ is false.
  std::thread planner_;
  std::atomic<bool> is_planned_ = false;
  eplb::Placement planned_;
  std::vector<double> past_balance_;

  eplb::Placement next_;  // where the moves lead
  eplb::MovePlan moves_;
  int64_t layer_ = 0;                          // being moved
  std::vector<eplb::Move> layer_moves_;        // of all ranks
  std::vector<std::optional<Incoming>> incoming_;  // by index in layer_moves_; those to this rank
  std::vector<model::ExpertMemory> spares_;

  mutable std::mutex report_mutex_;  // of report_ alone
  std::shared_ptr<const eplb::LoadReport> report_;

  Counter& rebalances_;
  Counter& moved_;
  // Rank 0's.
  BalanceGauges measured_;
  BalanceGauges planned_balance_;
  std::vector<Gauge*> layer_balance_;
  std::vector<Gauge*> rank_tokens_;
};

}  // namespace tandem::ep
