// One schedule: a cluster of P prefill and D decode workers, its load and its faults, all drawn from one seed.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/sim/fault_spec.h"
#include "src/sim/node.h"
#include "src/sim/routed_front.h"
#include "src/sim/router.h"

namespace tandem::sim {

class World final : public Workers {
 public:
  World(uint64_t seed, const FaultSpec& faults, const Seams& seams, kernels::Ops& ops);
  ~World() override;

  // Throws a Violation if an invariant is broken.
  void run();
  const Trace& trace() const { return trace_; }
  int64_t num_ok() const;
  int64_t num_failed() const;
  int64_t num_late() const;  // of the failed ones
  int64_t num_retries() const { return front_ ? front_->num_retries() : 0; }
  int64_t num_migrations() const { return front_ ? front_->num_migrations() : 0; }
  int64_t num_events() const { return num_events_; }

  // Workers
  engine::Engine* engine(int node) override;
  uint64_t incarnation(int node) override;
  void poke(int node) override;

 private:
  struct Slot {
    NodeSpec spec;
    std::unique_ptr<Node> node;  // null: dead
    int64_t frozen_until_us = 0;
  };
  void draw_cluster();
  void draw_plan();
  void draw_front(Legs& legs, bool all_alike);
  void draw_load();
  void ask(RequestSpec spec);
  int64_t num_unfinished() const;
  RequestSpec draw_request();
  void tick_faults();
  void start(int node);
  void kill(int node);
  void freeze(int node);
  void cut();
  void come_to_rest();
  void probe_pairs();
  void check_at_rest() const;
  // Handles the next event, or puts it off if its worker is frozen.
  void step();
  // Time is `until_us` afterwards, whether or not anything happened.
  void run_until(int64_t until_us);
  bool is_dead(const Owner& owner) const;

  const FaultSpec faults_;
  const Seams& seams_;
  kernels::Ops& ops_;
  EventQueue queue_;
  Random random_;
  Random block_sizes_;  // a stream of its own: schedules with equal sizes are what they were without it
  Trace trace_;
  int num_prefill_ = 1;
  int num_decode_ = 1;
  int64_t max_model_len_ = 64;
  std::optional<Plan> only_plan_;  // of requests that are not local; none: both
  bool slow_ = false;  // steps take as long as those of a large model
  bool short_queues_ = false;
  int64_t last_deadline_us_ = 0;
  std::vector<std::vector<TokenId>> prefixes_;  // that prompts share
  std::unique_ptr<Checker> checker_;
  std::unique_ptr<Network> network_;
  std::unique_ptr<NetworkLegs> legs_;
  std::unique_ptr<Legs> front_legs_;  // a seam before them, or empty
  std::unique_ptr<Router> router_;
  std::unique_ptr<RoutedFront> front_;  // the production router, in most runs; else router_ has the load
  std::vector<Slot> slots_;
  int64_t faults_end_us_ = 0;
  int64_t num_to_come_ = 0;  // requests that have not arrived yet
  int64_t num_events_ = 0;
  uint64_t next_incarnation_ = 1;
};

}  // namespace tandem::sim
