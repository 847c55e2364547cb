#include "src/sim/node.h"

#include <algorithm>
#include <utility>

namespace tandem::sim {
namespace {

// The loop of a real engine looks at its clock this often while requests wait (engine.cc).
constexpr int64_t kIdleTickUs = 20'000;
// Leases are renewed at such a look; nothing else needs one before a deadline.
constexpr int64_t kRenewLookUs = 1'000'000;

}  // namespace

Node::Node(EventQueue& queue, Random& random, Trace& trace, Checker& checker, Network& network, kernels::Ops& ops,
           const Seams& seams, const NodeSpec& spec, uint64_t incarnation, uint64_t nonce_seed)
    : queue_(queue),
      random_(random),
      trace_(trace),
      checker_(checker),
      spec_(spec),
      incarnation_(incarnation),
      model_(spec.max_model_len, spec.limits.block_size),
      cache_(ops, model_.info().kv, spec.num_blocks) {
  engine::EngineOptions options;
  options.model_name = "fake";
  options.limits = spec.limits;
  if (seams.no_room) options.limits.room_blocks = -1;
  options.sampled_vocab = engine::FakeModel::kVocab;
  options.kv_role = spec.role;
  options.kv_host = "node";
  engine_ = std::make_unique<engine::Engine>(model_, cache_, options, queue_, registry_);
  canary_ = std::make_unique<Canary>(cache_, engine_->pool());

  const uint64_t name = seams.repeat_incarnation ? 1 : incarnation;
  std::unique_ptr<SimAgent> agent = std::make_unique<SimAgent>(
      queue, random, checker, SimAgent::Place{spec.index, incarnation, name, nonce_seed}, cache_, spec.agent, [this] {
        engine_->wake();
        poke();
      });
  agent_ = agent.get();
  if (seams.handler) back_ = seams.handler(*agent);
  std::unique_ptr<comm::Messenger> messenger = network.listen(spec.index, back_ ? *back_ : *agent);
  agent->set_messenger(seams.messenger ? seams.messenger(std::move(messenger)) : std::move(messenger));
  front_ = std::move(agent);
  if (seams.agent) front_ = seams.agent(std::move(front_));
  engine_->attach(front_.get());
  trace_.add(What::kStart, spec_.index, incarnation);
}

Node::~Node() = default;

void Node::poke() { plan_turn(std::max(queue_.now_us() + random_.range(0, 50), busy_until_us_)); }

void Node::plan_turn(int64_t at_us) {
  if (turn_at_us_ <= at_us) return;
  turn_at_us_ = at_us;
  const uint64_t number = ++turn_number_;
  queue_.add(at_us, {spec_.index, incarnation_}, [this, number] {
    if (number != turn_number_) return;
    turn_at_us_ = INT64_MAX;
    turn();
  });
}

void Node::turn() {
  turned_ = true;
  const engine::Engine::Turn turn = engine_->run_once();
  trace_.add(What::kTurn, spec_.index, static_cast<uint64_t>(turn),
             static_cast<uint64_t>(engine_->scheduler().num_sequences()));
  checker_.check_deadlines(spec_.index, *engine_);
  if (turn == engine::Engine::Turn::kWorked) {
    busy_until_us_ = queue_.now_us() + random_.range(spec_.min_step_us, spec_.max_step_us);
    checker_.active(spec_.index, busy_until_us_);
    return plan_turn(busy_until_us_);
  }
  if (engine_->scheduler().num_sequences() > 0) plan_turn(next_look_us());
}

// When time alone gives the engine something to do. The looks in between, which change nothing, are left out.
int64_t Node::next_look_us() {
  int64_t next_us = queue_.now_us() + kRenewLookUs;
  for (const auto& [id, sequence] : engine_->scheduler().sequences()) {
    const int64_t deadline_us = sequence->request.deadline_us;
    if (deadline_us != 0) next_us = std::min(next_us, deadline_us + random_.range(1, kIdleTickUs));
  }
  return std::max(next_us, queue_.now_us() + 1);
}

void Node::check(int64_t num_connections) {
  canary_->look(std::exchange(turned_, false));
  checker_.check_open_blocks(spec_.index, *engine_);
  checker_.check_bounds(spec_.index, core(), num_connections);
}

}  // namespace tandem::sim
