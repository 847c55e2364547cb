// Keeps the load of a group's experts even while it works (--enable-eplb): counts where rows go, now and then computes a
// better placement, and moves experts there, a chunk with every round of the group.
//
//   count ──interval──> gather ──> plan ──> announce ──> move layer by layer ──> count
//           every rank's counts    rank 0, on a thread   weights and map of a layer switch together, on all ranks
//           go to rank 0           of its own            before the same step
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
#include <optional>
#include <thread>
#include <vector>

#include "src/base/metrics.h"
#include "src/ep/chunk_channel.h"
#include "src/ep/exchange.h"
#include "src/eplb/config.h"
#include "src/eplb/load_window.h"
#include "src/eplb/moves.h"
#include "src/eplb/placement.h"
#include "src/group/step_agreement.h"
#include "src/model/expert_store.h"

namespace tandem::ep {

struct BalancerOptions {
  eplb::EplbConfig config;
  eplb::Layout layout;         // passed check_layout
  int64_t window_offset = 0;   // where its part of the windows begins
  int64_t chunk_bytes = 1 << 18;
};

class Balancer final : public group::RoundUser {
 public:
  static int64_t window_bytes(const BalancerOptions& options) {
    return ChunkChannel::window_bytes(static_cast<int32_t>(options.layout.num_ranks), options.chunk_bytes);
  }
  // The experts that `rank` holds at start.
  static model::ExpertShard initial_shard(const eplb::Layout& layout, int32_t rank);

  // All outlive this; `exchange` has the initial shard and is prepared. Only rank 0 has metrics.
  Balancer(const BalancerOptions& options, Exchange& exchange, model::ExpertStore& store, Registry& registry);
  ~Balancer() override;

  Status begin_epoch(group::Fabric& fabric, group::StepAgreement& agreement) override;
  Status before_round(group::Fabric& fabric, group::StepIntent& mine) override;
  Status after_round(group::Fabric& fabric, std::span<const group::StepIntent> intents) override;

  int64_t carried_bytes() const override { return channel_.carried_bytes(); }

  const eplb::Placement& placement() const { return placement_; }
  // Layers that have been switched so far, since the start of the group.
  uint64_t version() const { return version_; }

 private:
  enum class Phase : uint8_t { kCount, kGather, kPlan, kAnnounce, kMove };
  struct Incoming {
    eplb::Move move;
    model::ExpertMemory memory;  // spare, being filled
  };

  void count_step();
  void start_gather();
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
  int64_t counts_bytes() const;
  int64_t table_bytes() const;
  int32_t num_ranks() const { return static_cast<int32_t>(options_.layout.num_ranks); }
  void report(const eplb::ExpertLoad& load, const eplb::Placement& next);

  const BalancerOptions options_;
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

  Counter& rebalances_;
  Counter& moved_;
  Gauge& measured_;
  Gauge& planned_balance_;
};

}  // namespace tandem::ep
