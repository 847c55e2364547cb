// One life of one worker: the production engine, pool, prefix cache and agent core with a fake model, turn by turn.
#pragma once

#include <memory>

#include "src/engine/engine.h"
#include "src/engine/fake_model.h"
#include "src/sim/checker.h"
#include "src/sim/network.h"
#include "src/sim/seams.h"
#include "src/sim/sim_agent.h"

namespace tandem::sim {

struct NodeSpec {
  int index = 0;
  KvRole role = KvRole::kBoth;
  int64_t num_blocks = 0;
  int64_t max_model_len = 0;
  int64_t min_step_us = 0;  // how long a step of the engine takes
  int64_t max_step_us = 0;
  engine::SchedulerLimits limits;
  transfer::AgentOptions agent;
};

class Node {
 public:
  Node(EventQueue& queue, Random& random, Trace& trace, Checker& checker, Network& network, kernels::Ops& ops,
       const Seams& seams, const NodeSpec& spec, uint64_t incarnation, uint64_t nonce_seed);
  ~Node();

  uint64_t incarnation() const { return incarnation_; }
  engine::Engine& engine() { return *engine_; }
  const transfer::AgentCore& core() const { return agent_->core(); }

  // There is news for the engine: it turns as soon as its step is over.
  void poke();
  // The invariants that hold after every event.
  void check(int64_t num_connections);

 private:
  void turn();
  void plan_turn(int64_t at_us);
  int64_t next_look_us();

  EventQueue& queue_;
  Random& random_;
  Trace& trace_;
  Checker& checker_;
  const NodeSpec spec_;
  const uint64_t incarnation_;
  engine::FakeModel model_;
  model::KvCache cache_;
  Registry registry_;
  std::unique_ptr<engine::Engine> engine_;
  SimAgent* agent_ = nullptr;                   // inside front_
  std::unique_ptr<comm::MessageHandler> back_;  // a seam behind the agent, or empty
  std::unique_ptr<transfer::Agent> front_;      // what the engine sees
  std::unique_ptr<Canary> canary_;

  int64_t busy_until_us_ = 0;
  bool turned_ = false;  // since the last check
  int64_t turn_at_us_ = INT64_MAX;
  uint64_t turn_number_ = 0;
};

}  // namespace tandem::sim
