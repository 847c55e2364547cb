#include "src/sim/world.h"

#include <algorithm>
#include <utility>

#include "src/sim/violation.h"

namespace tandem::sim {
namespace {

constexpr int64_t kFaultTickUs = 100'000;
constexpr int64_t kFaultsAfterLoadUs = 1'000'000;
constexpr int64_t kMaxEvents = 2'000'000;  // of a run; more is a loop without end
constexpr int64_t kBlockTokens[] = {4, 1, 2, 3, 8};  // the first as a rule
constexpr int64_t kMaxPoolTokens = 192;
constexpr int64_t kMaxIdleUs = 10'000'000;

}  // namespace

World::World(uint64_t seed, const FaultSpec& faults, const Seams& seams, kernels::Ops& ops)
    : faults_(faults), seams_(seams), ops_(ops), random_(seed), block_sizes_(~seed), trace_(queue_) {
  draw_cluster();
  draw_plan();
  for (int node = 0; node < num_prefill_ + num_decode_; ++node) start(node);
  if (front_) {
    int64_t longest_step_us = 0;
    for (const Slot& slot : slots_) longest_step_us = std::max(longest_step_us, slot.spec.max_step_us);
    checker_->watch_publications(longest_step_us);
  }
  draw_load();
}

World::~World() {
  for (Slot& slot : slots_) slot.node.reset();
}

// ---- What the seed decides -----------------------------------------------------------------------------------------

void World::draw_cluster() {
  num_prefill_ = 1 + static_cast<int>(random_.below(2));
  num_decode_ = 1 + static_cast<int>(random_.below(2));
  const int num_nodes = num_prefill_ + num_decode_;
  const bool all_alike = random_.chance(0.25);
  slow_ = random_.chance(0.25);
  short_queues_ = random_.chance(0.1);
  checker_ = std::make_unique<Checker>(queue_, trace_, num_nodes);
  network_ = std::make_unique<Network>(queue_, random_, trace_, num_nodes);
  network_->set_faults(faults_);
  legs_ = std::make_unique<NetworkLegs>(queue_, random_, *network_, *this, num_nodes);
  if (seams_.legs) front_legs_ = seams_.legs(*legs_);
  Legs& front = front_legs_ ? *front_legs_ : *legs_;
  router_ = std::make_unique<Router>(queue_, random_, trace_, *checker_, front, num_prefill_, num_decode_, all_alike);
  if (random_.chance(0.6)) draw_front(front, all_alike);

  const int64_t lease_us = random_.chance(0.5) ? 10'000'000 : 30'000'000;
  const bool prefix_caching = !random_.chance(0.1);
  const bool rows_depend_on_role = random_.chance(0.5);
  const bool sizes_differ = block_sizes_.chance(0.4);
  slots_.resize(static_cast<size_t>(num_nodes));
  for (int i = 0; i < num_nodes; ++i) {
    NodeSpec& spec = slots_[static_cast<size_t>(i)].spec;
    spec.index = i;
    spec.role = all_alike || random_.chance(0.3) ? KvRole::kBoth
                : i < num_prefill_               ? KvRole::kProducer
                                                 : KvRole::kConsumer;
    spec.max_model_len = max_model_len_;
    const int64_t block_size = kBlockTokens[sizes_differ ? block_sizes_.below(std::size(kBlockTokens)) : 0];
    spec.num_blocks = random_.range((max_model_len_ + block_size - 1) / block_size, kMaxPoolTokens / block_size);
    spec.min_step_us = slow_ ? 10'000 : 200;
    spec.max_step_us = slow_ ? random_.range(50'000, 2'000'000) : 3'000;
    spec.limits.block_size = block_size;
    if (short_queues_) spec.limits.max_num_waiting = random_.range(1, 4);
    spec.limits.max_num_seqs = random_.range(2, 8);
    spec.limits.max_num_batched_tokens = random_.range(8, 32);
    spec.limits.prefix_caching = prefix_caching;
    spec.limits.rows_depend_on_role = rows_depend_on_role;
    spec.agent.engine_id = fmt::format("{}{}", i < num_prefill_ ? "prefill" : "decode", i);
    spec.agent.model_fingerprint = "fake";
    spec.agent.role = spec.role;
    spec.agent.idle_timeout_us = random_.chance(0.5) ? 3'000'000 : kMaxIdleUs;
    spec.agent.lease_us = lease_us;
  }
}

// Workers of one role are asked in one way; both ways at once are for those that take both legs (docs/transfer.md).
void World::draw_plan() {
  const auto has = [this](KvRole role) {
    return std::any_of(slots_.begin(), slots_.end(), [role](const Slot& slot) { return slot.spec.role == role; });
  };
  if (has(KvRole::kProducer) && has(KvRole::kConsumer)) only_plan_ = random_.chance(0.5) ? Plan::kPush : Plan::kPull;
}

void World::draw_front(Legs& legs, bool all_alike) {
  constexpr router::PolicyKind kPolicies[] = {router::PolicyKind::kRoundRobin,         router::PolicyKind::kLeastLoad,
                                              router::PolicyKind::kPowerOfTwo,         router::PolicyKind::kPrefixAware,
                                              router::PolicyKind::kWeightedRoundRobin, router::PolicyKind::kSession};
  router::CoreOptions options;
  options.registry.prefill_policy = kPolicies[random_.below(std::size(kPolicies))];
  options.registry.decode_policy = kPolicies[random_.below(std::size(kPolicies))];
  options.registry.breaker.failures_to_open = static_cast<int>(random_.range(1, 5));
  options.registry.breaker.open_us = random_.range(100'000, 10'000'000);
  options.registry.seed = random_.next();
  options.pull = random_.chance(0.3);
  options.repeats = {static_cast<int>(random_.below(4)), static_cast<int>(random_.below(4))};
  options.enforce_disagg = random_.chance(0.3);
  options.local_prompt_tokens = random_.chance(0.3) ? random_.range(1, 16) : 0;
  short_queues_ = short_queues_ || random_.chance(0.1);
  if (short_queues_) {
    options.max_requests = random_.range(1, 8);
    options.queue_size = random_.range(0, 8);
  }
  options.queue_timeout_us = 200'000'000;  // beyond every deadline
  options.rescue_us = random_.range(0, 10'000'000);
  options.unresponsive_us = slow_ ? 10'000'000 : random_.range(1'000'000, 10'000'000);
  front_ = std::make_unique<RoutedFront>(
      RoutedFront::Surroundings{queue_, random_, trace_, *checker_, *network_, *this, legs, num_prefill_ + num_decode_},
      options, num_prefill_, num_decode_, all_alike);
}

void World::ask(RequestSpec spec) { front_ ? front_->start(std::move(spec)) : router_->start(std::move(spec)); }

int64_t World::num_unfinished() const {
  return router_->clients().num_unfinished() + (front_ ? front_->clients().num_unfinished() : 0);
}
int64_t World::num_ok() const { return router_->clients().num_ok() + (front_ ? front_->clients().num_ok() : 0); }
int64_t World::num_late() const { return router_->clients().num_late() + (front_ ? front_->clients().num_late() : 0); }
int64_t World::num_failed() const {
  return router_->clients().num_failed() + (front_ ? front_->clients().num_failed() : 0);
}

void World::draw_load() {
  for (int i = 0; i < 3; ++i) {
    std::vector<TokenId> prefix(static_cast<size_t>(random_.range(4, 24)));
    for (TokenId& token : prefix) token = static_cast<TokenId>(random_.below(engine::FakeModel::kVocab));
    prefixes_.push_back(std::move(prefix));
  }
  const int64_t mean_gap_us = random_.chance(0.5) ? 10'000 : 100'000;
  num_to_come_ = random_.range(10, 30);
  int64_t at_us = queue_.now_us();
  for (int64_t i = 0; i < num_to_come_; ++i) {
    queue_.add(at_us, {}, [this] {
      --num_to_come_;
      ask(draw_request());
      if (random_.chance(0.1)) {
        queue_.add(queue_.now_us() + random_.range(1, 500'000), {}, [this] { router_->replay(); });
      }
    });
    at_us += random_.range(1, 2 * mean_gap_us);
  }
  faults_end_us_ = at_us + kFaultsAfterLoadUs;
  if (faults_.kill > 0 || faults_.freeze > 0 || faults_.partition > 0) {
    queue_.add(queue_.now_us() + random_.range(1, kFaultTickUs), {}, [this] { tick_faults(); });
  }
}

RequestSpec World::draw_request() {
  RequestSpec spec;
  const size_t plan = random_.below(10);
  spec.plan = plan < 6 ? Plan::kPush : plan < 9 ? Plan::kPull : Plan::kLocal;
  if (only_plan_ && spec.plan != Plan::kLocal) spec.plan = *only_plan_;
  if (random_.chance(0.7)) spec.prompt = prefixes_[random_.below(prefixes_.size())];
  const int64_t own = random_.range(spec.prompt.empty() ? 1 : 0, 20);
  for (int64_t i = 0; i < own; ++i) {
    spec.prompt.push_back(static_cast<TokenId>(random_.below(engine::FakeModel::kVocab)));
  }
  spec.max_tokens = random_.range(1, 12);
  const int64_t now_us = queue_.now_us();
  const int64_t patience_us = slow_ ? random_.range(10'000'000, 90'000'000) : random_.range(3'000'000, 20'000'000);
  const bool is_short = random_.chance(0.1);
  spec.deadline_us = now_us + (is_short ? random_.range(1'000, 500'000) : patience_us);
  spec.has_time = !is_short && !slow_ && faults_.delay == 0;
  spec.tells_deadline = slow_ || random_.chance(0.95);
  spec.may_be_refused = short_queues_;
  last_deadline_us_ = std::max(last_deadline_us_, spec.deadline_us);
  spec.attempts = 3;
  if (random_.chance(faults_.cancel)) {
    spec.cancel_at_us = now_us + (random_.chance(0.8) ? random_.range(1, 30'000) : random_.range(1, 2'000'000));
  }
  return spec;
}

// ---- Faults --------------------------------------------------------------------------------------------------------

void World::tick_faults() {
  if (queue_.now_us() >= faults_end_us_) return;
  for (int node = 0; node < std::ssize(slots_); ++node) {
    if (random_.chance(faults_.kill)) kill(node);
    if (random_.chance(faults_.freeze)) freeze(node);
  }
  if (random_.chance(faults_.partition)) cut();
  queue_.add(queue_.now_us() + random_.range(kFaultTickUs / 2, kFaultTickUs * 3 / 2), {}, [this] { tick_faults(); });
}

void World::start(int node) {
  Slot& slot = slots_[static_cast<size_t>(node)];
  const uint64_t nonce_seed = seams_.repeat_incarnation ? static_cast<uint64_t>(node) : random_.next();
  slot.node = std::make_unique<Node>(queue_, random_, trace_, *checker_, *network_, ops_, seams_, slot.spec,
                                     next_incarnation_++, nonce_seed);
}

void World::kill(int node) {
  Slot& slot = slots_[static_cast<size_t>(node)];
  if (!slot.node) return;
  const uint64_t died = slot.node->incarnation();
  trace_.add(What::kKill, node, died);
  checker_->disturb(queue_.now_us());
  slot.node.reset();
  slot.frozen_until_us = 0;
  checker_->forget_node(node);
  legs_->lose_worker(node, died);
  queue_.add(queue_.now_us() + random_.range(5'000, 2'000'000), {}, [this, node] {
    if (slots_[static_cast<size_t>(node)].node) return;
    checker_->disturb(queue_.now_us());
    start(node);
  });
}

void World::freeze(int node) {
  Slot& slot = slots_[static_cast<size_t>(node)];
  const int64_t duration_us =
      random_.chance(0.7) ? random_.range(10'000, 1'000'000) : random_.range(1'000'000, 15'000'000);
  if (!slot.node) return;
  trace_.add(What::kFreeze, node, static_cast<uint64_t>(duration_us));
  slot.frozen_until_us = std::max(slot.frozen_until_us, queue_.now_us() + duration_us);
  checker_->disturb(slot.frozen_until_us);
}

// Between two places of the network, of which the router is the last.
void World::cut() {
  const size_t places = slots_.size() + 1;
  const size_t from = random_.below(places);
  const size_t to = (from + 1 + random_.below(places - 1)) % places;
  const int64_t duration_us =
      random_.chance(0.7) ? random_.range(10'000, 1'000'000) : random_.range(1'000'000, 8'000'000);
  checker_->disturb(queue_.now_us() + duration_us);
  network_->cut(static_cast<int>(from), static_cast<int>(to), duration_us);
  if (random_.chance(0.5)) network_->cut(static_cast<int>(to), static_cast<int>(from), duration_us);
}

// ---- Workers -------------------------------------------------------------------------------------------------------

engine::Engine* World::engine(int node) {
  Slot& slot = slots_[static_cast<size_t>(node)];
  return slot.node ? &slot.node->engine() : nullptr;
}
uint64_t World::incarnation(int node) { return slots_[static_cast<size_t>(node)].node->incarnation(); }
void World::poke(int node) { slots_[static_cast<size_t>(node)].node->poke(); }

// ---- The run -------------------------------------------------------------------------------------------------------

bool World::is_dead(const Owner& owner) const {
  const Slot& slot = slots_[static_cast<size_t>(owner.node)];
  return owner.incarnation != 0 && (!slot.node || slot.node->incarnation() != owner.incarnation);
}

void World::step() {
  Event event = queue_.take();
  const int node = event.owner.node;
  if (node >= 0) {
    if (is_dead(event.owner)) return;
    const int64_t thaw_us = slots_[static_cast<size_t>(node)].frozen_until_us;
    if (thaw_us > queue_.now_us()) return queue_.postpone(std::move(event), thaw_us);
  }
  if (++num_events_ > kMaxEvents) throw Violation("no-spinning", fmt::format("{} events and no end", num_events_));
  event.run();
  if (network_->last_fault_us() == queue_.now_us()) checker_->disturb(queue_.now_us());
  if (node < 0) return;
  Slot& slot = slots_[static_cast<size_t>(node)];
  if (slot.node) slot.node->check(network_->num_ends(node));
}

void World::run_until(int64_t until_us) {
  while (!queue_.empty() && queue_.next_us() <= until_us) step();
  queue_.advance_to(until_us);
}

void World::run() {
  while (num_to_come_ > 0 || num_unfinished() > 0) step();
  come_to_rest();
  check_at_rest();
  probe_pairs();
  come_to_rest();
  check_at_rest();
}

// Faults end, the dead come back; then every lease and time-out may run out.
void World::come_to_rest() {
  trace_.add(What::kQuiet, Owner::kNobody);
  faults_end_us_ = 0;
  network_->set_faults({});
  network_->heal();
  for (Slot& slot : slots_) slot.frozen_until_us = 0;
  const int64_t rest_us = slots_.front().spec.agent.lease_us + kMaxIdleUs + Checker::kSettleUs + 1'000'000;
  run_until(std::max(queue_.now_us(), last_deadline_us_ + Clients::kGraceUs) + rest_us);
}

// Every pair of workers serves a push and then a pull, whatever was before.
void World::probe_pairs() {
  checker_->watch_publications({});
  for (const Plan plan : {Plan::kPush, Plan::kPull}) {
    for (int prefill = 0; prefill < num_prefill_; ++prefill) {
      for (int decode = 0; decode < num_decode_; ++decode) {
        const auto probe = [&] {
          RequestSpec spec = draw_request();
          spec.plan = plan;
          spec.prefill = prefill;
          spec.decode = decode;
          spec.attempts = 1;
          spec.deadline_us = queue_.now_us() + 90'000'000;
          spec.cancel_at_us = 0;
          last_deadline_us_ = std::max(last_deadline_us_, spec.deadline_us);
          return spec;
        };
        router_->start(probe());
        if (front_ && front_->pulls() == (plan == Plan::kPull)) front_->start(probe());
      }
    }
    while (num_unfinished() > 0) step();
  }
}

void World::check_at_rest() const {
  router_->check_at_rest();
  if (front_) front_->check_at_rest();
  if (legs_->num_open() != 0) throw Violation("at-rest", fmt::format("{} legs are open", legs_->num_open()));
  for (int node = 0; node < std::ssize(slots_); ++node) {
    const Slot& slot = slots_[static_cast<size_t>(node)];
    CHECK(slot.node != nullptr);
    checker_->check_at_rest(node, slot.node->engine(), slot.node->core());
    // At most one link to and one from every other worker, and replaced ones whose peer opened them.
    if (slot.node->core().num_links() > 4 * std::ssize(slots_)) {
      throw Violation("at-rest", fmt::format("node {} has {} links", node, slot.node->core().num_links()));
    }
  }
}

}  // namespace tandem::sim
