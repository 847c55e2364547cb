#include "src/ep/balancer.h"

#include <algorithm>
#include <cstring>

#include "src/base/background.h"
#include "src/base/log.h"
#include "src/eplb/balance.h"
#include "src/eplb/policy.h"

namespace tandem::ep {

using group::Fabric;
using group::StepIntent;

namespace {

constexpr const char* kTag = "eplb";
// The first placement follows a guess, so the first rebalance comes early.
constexpr int64_t kFirstShare = 4;

// Counts travel as 32 bits: a bucket of a window has fewer tokens.
uint32_t narrow(int64_t tokens) { return static_cast<uint32_t>(std::min<int64_t>(tokens, UINT32_MAX)); }

std::vector<std::byte> pack_counts(std::span<const eplb::ExpertLoad> loads) {
  std::vector<uint32_t> counts;
  for (const eplb::ExpertLoad& load : loads) {
    for (const int64_t tokens : load.all()) counts.push_back(narrow(tokens));
  }
  const std::span<const std::byte> bytes = std::as_bytes(std::span(counts));
  return {bytes.begin(), bytes.end()};
}

// The inverse: `loads` have the shapes that were packed.
void unpack_counts(std::span<const std::byte> bytes, std::span<eplb::ExpertLoad> loads) {
  for (eplb::ExpertLoad& load : loads) {
    for (int64_t layer = 0; layer < load.num_layers(); ++layer) {
      for (int64_t& tokens : load.layer(layer)) {
        uint32_t count = 0;
        std::memcpy(&count, bytes.data(), sizeof count);
        bytes = bytes.subspan(sizeof count);
        tokens = count;
      }
    }
  }
}

}  // namespace

model::ExpertShard Balancer::initial_shard(const eplb::Layout& layout, int32_t rank) {
  const eplb::Placement placement = eplb::Placement::initial(1, layout);
  const std::span<const int32_t> slots = std::as_const(placement).layer(0);
  const size_t count = static_cast<size_t>(layout.slots_per_rank());
  const std::span<const int32_t> own = slots.subspan(static_cast<size_t>(rank) * count, count);
  return {rank, static_cast<int32_t>(layout.num_ranks), {own.begin(), own.end()}};
}

Balancer::Balancer(const BalancerOptions& options, Exchange& exchange, model::ExpertStore& store, Registry& registry)
    : options_(options),
      layout_(options.layout),
      exchange_(exchange),
      store_(store),
      rank_(exchange.shard().rank),
      placement_(eplb::Placement::initial(store.num_layers(), options.layout)),
      channel_(options.window_offset, options.chunk_bytes),
      step_load_(store.num_layers(), options.layout.num_experts),
      window_(store.num_layers(), options.layout.num_experts, options.config.window_size),
      rebalances_(registry.counter("tandem:eplb_rebalances_total", "Placements of experts that were carried out.")),
      moved_(registry.counter("tandem:eplb_moved_experts_total", "Experts that this rank has got from others.")) {
  CHECK_EQ(std::ssize(options.layers), num_layers());
  if (rank_ == 0) register_metrics(registry);
  CHECK_EQ(store.num_slots(), options.layout.slots_per_rank());
  for (int64_t layer = 0; layer < num_layers(); ++layer) use_map(layer);
  // A move may need one for each slot. Made now, since a step that has to make them takes longer than others.
  for (int64_t slot = 0; slot < store.num_slots(); ++slot) spares_.push_back(store.make_spare());
}

Balancer::~Balancer() {
  if (planner_.joinable()) planner_.join();
}

void Balancer::register_metrics(Registry& registry) {
  const auto balance = [&registry](const char* placement) {
    const auto gauge = [&](const char* layers) {
      Gauge& made = registry.gauge("tandem:eplb_balancedness",
                                   "Mean over maximum of the ranks' tokens in the last window: of all layers together, "
                                   "what half and 99 % of them reach, and the worst.",
                                   {{"placement", placement}, {"layers", layers}});
      made.set(1);
      return &made;
    };
    return BalanceGauges{gauge("overall"), gauge("p50"), gauge("p99"), gauge("worst")};
  };
  measured_ = balance("measured");
  planned_balance_ = balance("planned");
  for (const int64_t layer : options_.layers) {
    layer_balance_.push_back(&registry.gauge("tandem:eplb_layer_balancedness",
                                             "Mean over maximum of the ranks' tokens of a layer in the last window.",
                                             {{"layer", std::to_string(layer)}}));
    layer_balance_.back()->set(1);
  }
  for (int32_t r = 0; r < num_ranks(); ++r) {
    rank_tokens_.push_back(&registry.gauge("tandem:eplb_rank_tokens",
                                           "Rows that a rank's experts computed in the last window, over all layers.",
                                           {{"rank", std::to_string(r)}}));
  }
}

void Balancer::BalanceGauges::set(const eplb::BalanceReport& balance) const {
  overall->set(balance.overall);
  p50->set(balance.p50);
  p99->set(balance.p99);
  worst->set(balance.worst);
}

int64_t Balancer::table_bytes() const {
  return num_layers() * placement_.num_slots() * static_cast<int64_t>(sizeof(int32_t));
}

void Balancer::use_map(int64_t layer) {
  exchange_.set_map(layer, ExpertMap(std::as_const(placement_).layer(layer), num_ranks(),
                                     static_cast<int32_t>(options_.layout.num_experts)));
}

// ---- Rounds --------------------------------------------------------------------------------------------------------

Status Balancer::before_round(Fabric& fabric, StepIntent& mine) {
  if (!is_synchronizing_) count_step();
  if (phase_ == Phase::kPlan && rank_ == 0 && is_planned_.load(std::memory_order_acquire)) mine.is_planned = 1;
  mine.placement_version = static_cast<int64_t>(version_);
  mine.first_of_node = first_of_node_;
  return channel_.send(fabric, [this](size_t index, int64_t offset, std::span<std::byte> out) {
    fill(index, offset, out);
  });
}

Status Balancer::after_round(Fabric& fabric, std::span<const StepIntent> intents) {
  const bool is_through = channel_.receive(fabric, [this](size_t index, int64_t offset, std::span<const std::byte> in) {
    take(index, offset, in);
  });
  if (is_synchronizing_) return {};
  ++steps_;
  switch (phase_) {
    case Phase::kCount:
      if (steps_ >= next_rebalance_) {
        start_gather();
      } else if (steps_ >= next_report_) {
        start_report();
      }
      break;
    case Phase::kReport:
      if (!is_through) break;
      if (rank_ == 0) show(sum_gathered(), std::nullopt);
      next_report_ = steps_ + kStepsPerReport;
      phase_ = Phase::kCount;
      break;
    case Phase::kGather:
      if (!is_through) break;
      phase_ = Phase::kPlan;
      if (rank_ == 0) start_planning();
      break;
    case Phase::kPlan:
      if (intents[0].is_planned != 0) start_announcing(0, planned_);
      break;
    case Phase::kAnnounce:
      if (is_through) TANDEM_TRY(take_announcement());
      break;
    case Phase::kMove:
      if (is_through) commit_layer();
      break;
  }
  return {};
}

// What the step before this round sent where.
void Balancer::count_step() {
  exchange_.take_counts(step_load_);
  window_.add_step(step_load_);
}

// ---- Counts to rank 0 ----------------------------------------------------------------------------------------------

void Balancer::start_report() {
  outgoing_ = pack_counts(std::span(&window_.total(), 1));
  gather(Phase::kReport);
}

void Balancer::start_gather() {
  eplb::LoadSeries samples = window_.samples();
  // The newest bucket last; those that are missing at the beginning are zero.
  const int64_t missing = eplb::LoadWindow::kBuckets - std::ssize(samples);
  samples.insert(samples.begin(), static_cast<size_t>(missing),
                 eplb::ExpertLoad(num_layers(), options_.layout.num_experts));
  outgoing_ = pack_counts(samples);
  gather(Phase::kGather);
}

// outgoing_ of every rank to rank 0.
void Balancer::gather(Phase phase) {
  if (rank_ == 0) gathered_.assign(static_cast<size_t>(num_ranks()), std::vector<std::byte>(outgoing_.size()));
  std::vector<BulkTransfer> transfers;
  for (int32_t r = 0; r < num_ranks(); ++r) transfers.push_back({r, 0, std::ssize(outgoing_)});
  channel_.start(num_ranks(), std::move(transfers));
  gathered_steps_ = window_.num_steps();
  phase_ = phase;
}

eplb::ExpertLoad Balancer::sum_gathered() {
  eplb::LoadSeries loads(static_cast<size_t>(num_ranks()), eplb::ExpertLoad(num_layers(), options_.layout.num_experts));
  for (size_t r = 0; r < loads.size(); ++r) unpack_counts(gathered_[r], std::span(&loads[r], 1));
  gathered_.clear();
  return eplb::sum_of(loads);
}

void Balancer::start_planning() {
  std::vector<eplb::LoadSeries> ranks;
  for (const std::vector<std::byte>& bytes : gathered_) {
    ranks.emplace_back(eplb::LoadWindow::kBuckets, eplb::ExpertLoad(num_layers(), options_.layout.num_experts));
    unpack_counts(bytes, ranks.back());
  }
  gathered_.clear();
  is_planned_ = false;
  if (planner_.joinable()) planner_.join();
  planner_ = std::thread([this, ranks = std::move(ranks)]() mutable { plan(std::move(ranks)); });
}

// On rank 0's planner.
void Balancer::plan(std::vector<eplb::LoadSeries> ranks) {
  // Nobody waits for a plan, all ranks wait for rank 0's step.
  yield_to_all_others("planning where experts go");
  eplb::LoadSeries window = eplb::sum_over_ranks(ranks);
  std::erase_if(window, [](const eplb::ExpertLoad& load) { return load.total() == 0; });
  planned_ = placement_;  // committed placements do not change while one is planned
  if (!window.empty()) {
    const eplb::RebalanceInput input{window, layout_, placement_, past_balance_};
    planned_ = eplb::rebalance(options_.config.policy, input);
    eplb::keep_slots(placement_, planned_);
    report_plan(eplb::sum_of(window), planned_);
  }
  is_planned_.store(true, std::memory_order_release);
}

void Balancer::report_plan(const eplb::ExpertLoad& load, const eplb::Placement& next) {
  const eplb::BalanceReport now = eplb::report_balance(load, placement_);
  const eplb::BalanceReport then = eplb::report_balance(load, next);
  past_balance_ = then.layers;
  planned_balance_.set(then);
  show(load, then);
  const int64_t remote = eplb::plan_moves(placement_, next, layout_.num_nodes).num_remote();
  if (!options_.config.log_balancedness) return;
  log_info(kTag, "balancedness {:.3f} (p50 {:.3f}, p99 {:.3f}) of the window, {:.3f} as planned{}; {} experts move",
           now.overall, now.p50, now.p99, then.overall,
           is_hierarchical() ? fmt::format(" for {} nodes", layout_.num_nodes) : std::string(), remote);
}

// On the engine thread or the planner; never on both at once. `planned`: by a rebalance just now.
void Balancer::show(const eplb::ExpertLoad& load, std::optional<eplb::BalanceReport> planned) {
  eplb::LoadReport report;
  report.steps = gathered_steps_;
  report.num_nodes = layout_.num_nodes;
  report.is_hierarchical = is_hierarchical();
  report.changes = version_;
  report.load = load;
  report.placement = placement_;
  report.balance = eplb::report_balance(load, placement_);
  report.planned = std::move(planned);
  measured_.set(report.balance);
  for (size_t l = 0; l < layer_balance_.size(); ++l) layer_balance_[l]->set(report.balance.layers[l]);
  const std::vector<double> tokens = eplb::total_rank_loads(report);
  for (size_t r = 0; r < rank_tokens_.size(); ++r) rank_tokens_[r]->set(tokens[r]);
  const std::lock_guard<std::mutex> lock(report_mutex_);
  if (!report.planned && report_ != nullptr) report.planned = report_->planned;
  report_ = std::make_shared<const eplb::LoadReport>(std::move(report));
}

std::shared_ptr<const eplb::LoadReport> Balancer::load_report() const {
  const std::lock_guard<std::mutex> lock(report_mutex_);
  return report_;
}

// ---- A placement to all --------------------------------------------------------------------------------------------

void Balancer::start_announcing(int32_t from, const eplb::Placement& placement) {
  table_.assign(static_cast<size_t>(table_bytes()), std::byte{0});
  if (rank_ == from) {
    outgoing_.resize(table_.size());
    std::byte* out = outgoing_.data();
    for (int64_t layer = 0; layer < num_layers(); ++layer) {
      const std::span<const std::byte> slots = std::as_bytes(placement.layer(layer));
      out = std::copy(slots.begin(), slots.end(), out);
    }
  }
  std::vector<BulkTransfer> transfers;
  for (int32_t r = 0; r < num_ranks(); ++r) transfers.push_back({from, r, table_bytes()});
  channel_.start(num_ranks(), std::move(transfers));
  phase_ = Phase::kAnnounce;
}

Status Balancer::take_announcement() {
  next_ = eplb::Placement(num_layers(), options_.layout);
  const std::byte* in = table_.data();
  for (int64_t layer = 0; layer < num_layers(); ++layer) {
    const std::span<std::byte> slots = std::as_writable_bytes(next_.layer(layer));
    std::memcpy(slots.data(), in, slots.size());
    in += slots.size();
  }
  if (const Status checked = next_.check(); !checked.ok()) {
    return make_error(ErrorKind::kDataLoss, "the placement of experts that came from a rank is wrong: {}",
                      checked.error().message);
  }
  if (is_synchronizing_) return {};
  moves_ = eplb::plan_moves(placement_, next_, layout_.num_nodes);
  window_.clear();
  start_layer(0);
  return {};
}

// ---- Moves ---------------------------------------------------------------------------------------------------------

// From `layer` on the next one that has moves.
void Balancer::start_layer(int64_t layer) {
  for (layer_ = layer; layer_ < num_layers(); ++layer_) {
    const eplb::LayerMoves& moves = moves_.layers[static_cast<size_t>(layer_)];
    layer_moves_ = moves.local;
    layer_moves_.insert(layer_moves_.end(), moves.remote.begin(), moves.remote.end());
    if (!layer_moves_.empty()) break;
  }
  if (layer_ == num_layers()) {
    if (rank_ == 0) rebalances_.add(1);
    next_rebalance_ = steps_ + options_.config.step_interval;
    phase_ = Phase::kCount;
    return;
  }
  const int64_t slots_per_rank = options_.layout.slots_per_rank();
  const std::array<int64_t, 2> bytes = store_.slot_bytes(layer_);
  std::vector<BulkTransfer> transfers;
  incoming_.assign(layer_moves_.size(), std::nullopt);
  for (size_t i = 0; i < layer_moves_.size(); ++i) {
    const eplb::Move& move = layer_moves_[i];
    const BulkTransfer transfer{static_cast<int32_t>(move.source_slot / slots_per_rank),
                                static_cast<int32_t>(move.slot / slots_per_rank), bytes[0] + bytes[1]};
    transfers.push_back(transfer);
    if (transfer.target != rank_) continue;
    CHECK(!spares_.empty());
    incoming_[i] = Incoming{move, spares_.back()};
    spares_.pop_back();
  }
  channel_.start(num_ranks(), std::move(transfers));
  phase_ = Phase::kMove;
}

// Before the same step on all ranks: weights and map of the layer switch.
void Balancer::commit_layer() {
  const int64_t first = rank_ * options_.layout.slots_per_rank();
  for (const std::optional<Incoming>& incoming : incoming_) {
    if (!incoming) continue;
    spares_.push_back(store_.replace(layer_, incoming->move.slot - first, incoming->memory));
    if (incoming->move.source_slot / options_.layout.slots_per_rank() != rank_) moved_.add(1);
  }
  incoming_.clear();
  const std::span<const int32_t> slots = std::as_const(next_).layer(layer_);
  std::copy(slots.begin(), slots.end(), placement_.layer(layer_).begin());
  use_map(layer_);
  ++version_;
  start_layer(layer_ + 1);
}

void Balancer::fill(size_t index, int64_t offset, std::span<std::byte> out) {
  if (phase_ == Phase::kMove) {
    const int64_t first = rank_ * options_.layout.slots_per_rank();
    return copy_expert(store_.slot(layer_, layer_moves_[index].source_slot - first), layer_, offset, out);
  }
  std::memcpy(out.data(), outgoing_.data() + offset, out.size());
}

void Balancer::take(size_t index, int64_t offset, std::span<const std::byte> in) {
  if (phase_ == Phase::kMove) return write_expert(incoming_[index]->memory, layer_, offset, in);
  const bool is_gathering = phase_ == Phase::kGather || phase_ == Phase::kReport;
  std::vector<std::byte>& target = is_gathering ? gathered_[index] : table_;
  std::memcpy(target.data() + offset, in.data(), in.size());
}

// An expert's two parts as one run of bytes.
void Balancer::copy_expert(const model::ExpertMemory& memory, int64_t layer, int64_t offset,
                           std::span<std::byte> out) const {
  const int64_t first = store_.slot_bytes(layer)[0];
  const int64_t in_first = std::clamp<int64_t>(first - offset, 0, std::ssize(out));
  std::memcpy(out.data(), memory.gate_up + offset, static_cast<size_t>(in_first));
  const std::span<std::byte> rest = out.subspan(static_cast<size_t>(in_first));
  if (!rest.empty()) std::memcpy(rest.data(), memory.down + (offset + in_first - first), rest.size());
}

void Balancer::write_expert(const model::ExpertMemory& memory, int64_t layer, int64_t offset,
                            std::span<const std::byte> in) const {
  const int64_t first = store_.slot_bytes(layer)[0];
  const int64_t in_first = std::clamp<int64_t>(first - offset, 0, std::ssize(in));
  std::memcpy(memory.gate_up + offset, in.data(), static_cast<size_t>(in_first));
  const std::span<const std::byte> rest = in.subspan(static_cast<size_t>(in_first));
  if (!rest.empty()) std::memcpy(memory.down + (offset + in_first - first), rest.data(), rest.size());
}

// ---- A new epoch ---------------------------------------------------------------------------------------------------

Status Balancer::begin_epoch(Fabric& fabric, group::StepAgreement& agreement) {
  phase_ = Phase::kCount;
  channel_.stop();
  for (const std::optional<Incoming>& incoming : incoming_) {
    if (incoming) spares_.push_back(incoming->memory);
  }
  incoming_.clear();
  if (planner_.joinable()) planner_.join();
  is_planned_ = false;
  window_.clear();
  exchange_.take_counts(step_load_);
  steps_ = 0;
  next_rebalance_ = std::max<int64_t>(1, options_.config.step_interval / kFirstShare);
  next_report_ = kStepsPerReport;
  first_of_node_ = 0;
  while (fabric.direct(group::RankId(first_of_node_)) == nullptr) ++first_of_node_;

  is_synchronizing_ = true;
  const auto round = [&]() -> Result<std::vector<StepIntent>> {
    StepIntent mine;
    TANDEM_TRY(before_round(fabric, mine));
    TANDEM_ASSIGN(std::vector<StepIntent> intents, agreement.agree(mine));
    TANDEM_TRY(after_round(fabric, intents));
    return intents;
  };
  TANDEM_ASSIGN(const std::vector<StepIntent> intents, round());
  find_nodes(intents);
  const auto is_older = [](const StepIntent& a, const StepIntent& b) { return a.placement_version < b.placement_version; };
  const auto newest = std::max_element(intents.begin(), intents.end(), is_older);
  const auto oldest = std::min_element(intents.begin(), intents.end(), is_older);
  if (newest->placement_version != oldest->placement_version) {
    start_announcing(static_cast<int32_t>(newest - intents.begin()), placement_);
    while (channel_.is_busy()) TANDEM_TRY(round());
    TANDEM_TRY(take_announcement());
    TANDEM_TRY(adopt(fabric, next_));
    version_ = static_cast<uint64_t>(newest->placement_version);
    // Nobody computes before all have read what they lacked.
    TANDEM_TRY(round());
  }
  is_synchronizing_ = false;
  phase_ = Phase::kCount;
  return {};
}

// All ranks see the same.
void Balancer::find_nodes(std::span<const StepIntent> intents) {
  std::vector<int32_t> first_of_node;
  for (const StepIntent& intent : intents) first_of_node.push_back(static_cast<int32_t>(intent.first_of_node));
  layout_.num_nodes = eplb::count_even_nodes(first_of_node);
  if (rank_ != 0 || layout_.num_nodes == 1) return;
  const char* const how = is_hierarchical() ? "groups of experts stay on a node" : "experts go to any of them";
  log_info(kTag, "ranks are on {} nodes: {}", layout_.num_nodes, how);
}

// This rank holds what its own placement says; what the newest one wants instead is read from the files.
Status Balancer::adopt(Fabric& fabric, const eplb::Placement& newest) {
  const int64_t first = rank_ * options_.layout.slots_per_rank();
  int64_t num_read = 0;
  for (int64_t layer = 0; layer < num_layers(); ++layer) {
    const std::span<int32_t> have = placement_.layer(layer);
    const std::span<const int32_t> want = newest.layer(layer);
    for (int64_t slot = 0; slot < options_.layout.slots_per_rank(); ++slot) {
      const size_t place = static_cast<size_t>(first + slot);
      if (have[place] == want[place]) continue;
      fabric.beat();
      TANDEM_TRY(store_.reload(layer, slot, want[place]));
      ++num_read;
    }
    std::copy(want.begin(), want.end(), have.begin());
    use_map(layer);
  }
  if (num_read > 0) log_info(kTag, "rank {}: read {} experts again, to hold those that the group expects", rank_, num_read);
  return {};
}

}  // namespace tandem::ep
