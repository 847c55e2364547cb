// Ranks that balance their experts, over stores whose memory names the expert that lies in it.
#include "src/ep/balancer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>

#include "src/ep/test_support.h"

namespace tandem::ep {
namespace {

constexpr int64_t kRows = 8;
constexpr int64_t kMaxSteps = 100'000;

// Expert memory of two parts; each byte follows from layer, expert and place.
class PatternStore final : public model::ExpertStore {
 public:
  PatternStore(int64_t layers, const std::vector<int32_t>& experts) : layers_(layers), slots_(std::ssize(experts)) {
    for (int64_t l = 0; l < layers; ++l) {
      for (const int32_t expert : experts) {
        held_.push_back(make_spare());
        write(held_.back(), l, expert);
      }
    }
  }

  int64_t num_layers() const override { return layers_; }
  int64_t num_slots() const override { return slots_; }
  std::array<int64_t, 2> slot_bytes(int64_t layer) const override { return {kGateUpBytes + 8 * layer, kDownBytes}; }
  std::string layout() const override { return "pattern"; }
  model::ExpertMemory slot(int64_t layer, int64_t slot) override { return at(layer, slot); }
  model::ExpertMemory make_spare() override {
    for (const int64_t bytes : {slot_bytes(layers_ - 1)[0], kDownBytes}) {
      memory_.emplace_back(static_cast<size_t>(bytes));
    }
    return {memory_[memory_.size() - 2].data(), memory_.back().data()};
  }
  model::ExpertMemory replace(int64_t layer, int64_t slot, const model::ExpertMemory& memory) override {
    return std::exchange(at(layer, slot), memory);
  }
  Status reload(int64_t layer, int64_t slot, int32_t expert) override {
    write(at(layer, slot), layer, expert);
    return {};
  }
  bool holds(int64_t layer, int64_t slot, int32_t expert) {
    const model::ExpertMemory memory = at(layer, slot);
    for (int part = 0; part < 2; ++part) {
      const std::byte* const bytes = part == 0 ? memory.gate_up : memory.down;
      for (int64_t i = 0; i < slot_bytes(layer)[static_cast<size_t>(part)]; ++i) {
        if (bytes[i] != byte_of(layer, expert, part, i)) return false;
      }
    }
    return true;
  }

 private:
  static constexpr int64_t kGateUpBytes = 300;
  static constexpr int64_t kDownBytes = 170;

  static std::byte byte_of(int64_t layer, int32_t expert, int part, int64_t i) {
    return static_cast<std::byte>(37 * layer + 11 * expert + 5 * part + 3 * i + 1);
  }
  void write(const model::ExpertMemory& memory, int64_t layer, int32_t expert) {
    for (int64_t i = 0; i < slot_bytes(layer)[0]; ++i) memory.gate_up[i] = byte_of(layer, expert, 0, i);
    for (int64_t i = 0; i < slot_bytes(layer)[1]; ++i) memory.down[i] = byte_of(layer, expert, 1, i);
  }
  model::ExpertMemory& at(int64_t layer, int64_t slot) { return held_[static_cast<size_t>(layer * slots_ + slot)]; }

  const int64_t layers_;
  const int64_t slots_;
  std::deque<std::vector<std::byte>> memory_;
  std::vector<model::ExpertMemory> held_;
};

// As between nodes: a rank sees the windows of its own node only. `node_of`: of each rank.
class NodeFabric final : public group::Fabric {
 public:
  NodeFabric(group::Fabric& mapped, const std::vector<int32_t>& node_of) : mapped_(mapped), node_of_(node_of) {}
  group::RankId rank() const override { return mapped_.rank(); }
  int32_t size() const override { return mapped_.size(); }
  group::Epoch epoch() const override { return mapped_.epoch(); }
  std::span<std::byte> window() override { return mapped_.window(); }
  std::byte* direct(group::RankId to) override { return node(to) == node(rank()) ? mapped_.direct(to) : nullptr; }
  void put(group::RankId to, int64_t offset, std::span<const std::byte> data) override { mapped_.put(to, offset, data); }
  Status flush() override { return mapped_.flush(); }
  void signal(group::RankId to, group::Channel channel, uint64_t value) override { mapped_.signal(to, channel, value); }
  uint64_t signalled(group::RankId from, group::Channel channel) const override {
    return mapped_.signalled(from, channel);
  }
  Status wait(group::RankId from, group::Channel channel, uint64_t value) override {
    return mapped_.wait(from, channel, value);
  }
  void beat() override { mapped_.beat(); }
  void end(const Error& why) override { mapped_.end(why); }
  Status status() const override { return mapped_.status(); }

 private:
  int32_t node(group::RankId rank) const { return node_of_[static_cast<size_t>(rank.value)]; }
  group::Fabric& mapped_;
  const std::vector<int32_t>& node_of_;
};

struct Case {
  std::string policy = "default";
  std::vector<int32_t> node_of = {0, 0, 0, 0};
  int64_t num_groups = 1;
  int64_t step_interval = 24;
  int64_t steps = 150;
  uint64_t min_changes = 2;  // steps go on until so many layers have switched: the planner has a thread of its own
};

// A group of four ranks, two layers of 16 experts with two spare slots each, and what became of it.
class BalancedGroup {
 public:
  explicit BalancedGroup(const Case& test) : test_(test) {
    experts_.num_experts = 16;
    kernels::Random random(1);
    experts_.fill(random);
    options_.config.policy = eplb::parse_policy(test.policy).value();
    options_.config.window_size = 16;
    options_.config.step_interval = test.step_interval;
    options_.config.num_redundant_experts = 8;
    options_.layout = {.num_experts = 16, .num_redundant = 8, .num_ranks = 4, .num_groups = test.num_groups};
    options_.layers = {1, 3};
    options_.chunk_bytes = 256;  // an expert takes several rounds
    for (int32_t r = 0; r < 4; ++r) {
      const model::ExpertShard shard = Balancer::initial_shard(options_.layout, r);
      ExchangeOptions exchange;
      exchange.window_offset = group::StepAgreement::window_bytes(4);
      ranks_.push_back(std::make_unique<TestRank>("auto", experts_, shard, exchange, kRows));
      stores_.push_back(std::make_unique<PatternStore>(experts_.num_layers, shard.slots));
      registries_.push_back(std::make_unique<Registry>());
    }
    const int64_t bytes = group::StepAgreement::window_bytes(4) + ranks_[0]->exchange().plan().bytes;
    options_.window_offset = (bytes + 63) / 64 * 64;
    for (size_t r = 0; r < 4; ++r) {
      balancers_.push_back(
          std::make_unique<Balancer>(options_, ranks_[r]->exchange(), *stores_[r], *registries_[r]));
    }
    run();
  }

  Balancer& balancer(size_t rank) { return *balancers_[rank]; }
  std::string metrics(size_t rank) const { return registries_[rank]->expose(); }

  // All ranks say the same, and each holds what it says.
  void expect_consistent() {
    for (size_t r = 0; r < 4; ++r) {
      const eplb::Placement& placement = balancers_[r]->placement();
      EXPECT_TRUE(placement == balancers_[0]->placement()) << r;
      EXPECT_EQ(balancers_[r]->num_nodes(), balancers_[0]->num_nodes()) << r;
      EXPECT_EQ(balancers_[r]->version(), balancers_[0]->version()) << r;
      for (int64_t l = 0; l < experts_.num_layers; ++l) {
        for (int64_t slot = 0; slot < placement.slots_per_rank(); ++slot) {
          const size_t place = r * static_cast<size_t>(placement.slots_per_rank()) + static_cast<size_t>(slot);
          EXPECT_TRUE(stores_[r]->holds(l, slot, placement.layer(l)[place])) << r << " " << l << " " << slot;
        }
      }
    }
  }

 private:
  // Steps of all ranks; experts of low numbers are chosen more often. Nothing is computed: only where rows go counts.
  void run() {
    group::ThreadGroup threads(4, options_.window_offset + Balancer::window_bytes(options_));
    threads.run([&](group::Fabric& mapped) {
      NodeFabric fabric(mapped, test_.node_of);
      const size_t r = static_cast<size_t>(fabric.rank().value);
      Exchange& exchange = ranks_[r]->exchange();
      exchange.attach(fabric);
      group::StepAgreement agreement(fabric);
      ASSERT_TRUE(balancers_[r]->begin_epoch(fabric, agreement).ok());
      kernels::Random random(100 + r);
      // All ranks are at the same version, so they stop at the same step.
      for (int64_t step = 0; step < test_.steps || balancers_[r]->version() < test_.min_changes; ++step) {
        ASSERT_LT(step, kMaxSteps);
        group::StepIntent mine;
        ASSERT_TRUE(balancers_[r]->before_round(fabric, mine).ok());
        const Result<std::vector<group::StepIntent>> intents = agreement.agree(mine);
        ASSERT_TRUE(intents.ok()) << intents.error().message;
        ASSERT_TRUE(balancers_[r]->after_round(fabric, *intents).ok());
        for (int64_t l = 0; l < experts_.num_layers; ++l) send_rows(*ranks_[r], l, random);
      }
      exchange.detach();
    });
  }

  void send_rows(TestRank& rank, int64_t layer, kernels::Random& random) {
    RankInput input = make_input(random, experts_, kRows, Routing::kRandom);
    for (int64_t t = 0; t < kRows; ++t) input.ids.row(t)[0] = static_cast<int32_t>(layer);  // the favourite
    for (int64_t t = 0; t < kRows; ++t) {
      for (int64_t j = 1; j < experts_.top_k; ++j) {
        if (input.ids.row(t)[j] == layer) input.ids.row(t)[j] = 15 - static_cast<int32_t>(j);
      }
    }
    Exchange& exchange = rank.exchange();
    ASSERT_TRUE(exchange.dispatch(layer, rank.device().put(input.x), rank.device().put(input.ids)).ok());
    while (true) {
      const Result<model::ReceivedSlots> received = exchange.receive();
      ASSERT_TRUE(received.ok()) << received.error().message;
      if (received->count == 0) break;
      ASSERT_TRUE(exchange.give_back().ok());
    }
    ASSERT_TRUE(exchange.collect().ok());
  }

  const Case test_;
  TestExperts experts_;
  BalancerOptions options_;
  std::vector<std::unique_ptr<TestRank>> ranks_;
  std::vector<std::unique_ptr<PatternStore>> stores_;
  std::vector<std::unique_ptr<Registry>> registries_;
  std::vector<std::unique_ptr<Balancer>> balancers_;
};

// The nodes on which copies of an expert are, in order.
std::vector<int64_t> nodes_of(const eplb::Placement& placement, int64_t layer, int32_t expert) {
  std::vector<int64_t> nodes;
  const std::span<const int32_t> slots = placement.layer(layer);
  for (size_t s = 0; s < slots.size(); ++s) {
    const int64_t node = static_cast<int64_t>(s) / (placement.slots_per_rank() * 2);
    if (slots[s] == expert && (nodes.empty() || nodes.back() != node)) nodes.push_back(node);
  }
  return nodes;
}

bool keeps_groups_on_nodes(const eplb::Placement& placement, int64_t num_groups) {
  const int64_t group_size = placement.num_experts() / num_groups;
  for (int64_t l = 0; l < placement.num_layers(); ++l) {
    for (int32_t e = 0; e < placement.num_experts(); ++e) {
      const std::vector<int64_t> nodes = nodes_of(placement, l, e);
      const int32_t first = static_cast<int32_t>(e / group_size * group_size);
      if (nodes.size() != 1 || nodes != nodes_of(placement, l, first)) return false;
    }
  }
  return true;
}

TEST(Balancer, GroupsOfExpertsStayOnANodeWhereThereAreTwo) {
  BalancedGroup group({.node_of = {0, 0, 1, 1}, .num_groups = 4});
  group.expect_consistent();
  EXPECT_EQ(group.balancer(0).num_nodes(), 2);
  EXPECT_GE(group.balancer(0).version(), 2U);
  EXPECT_TRUE(keeps_groups_on_nodes(group.balancer(0).placement(), 4));
  const std::shared_ptr<const eplb::LoadReport> report = group.balancer(0).load_report();
  ASSERT_NE(report, nullptr);
  EXPECT_TRUE(report->is_hierarchical);
  EXPECT_EQ(report->num_nodes, 2);
}

TEST(Balancer, GroupsAreSpreadOverOneNode) {
  BalancedGroup group({.num_groups = 4});
  group.expect_consistent();
  EXPECT_EQ(group.balancer(0).num_nodes(), 1);
  EXPECT_GE(group.balancer(0).version(), 2U);
  EXPECT_FALSE(keeps_groups_on_nodes(group.balancer(0).placement(), 4));
  EXPECT_FALSE(group.balancer(0).load_report()->is_hierarchical);
}

TEST(Balancer, NodesThatRanksAreNotSpreadOverEvenlyAreOne) {
  for (const std::vector<int32_t>& node_of : {std::vector{0, 0, 0, 1}, std::vector{0, 1, 0, 1}}) {
    BalancedGroup group({.node_of = node_of, .num_groups = 4});
    group.expect_consistent();
    EXPECT_EQ(group.balancer(0).num_nodes(), 1);
    EXPECT_GE(group.balancer(0).version(), 2U);
  }
}

TEST(Balancer, EveryPolicyMovesWholeExperts) {
  for (const char* policy : {"default", "swift", "flash"}) {
    SCOPED_TRACE(policy);
    BalancedGroup group({.policy = policy, .node_of = {0, 0, 1, 1}});
    group.expect_consistent();
    EXPECT_GE(group.balancer(0).version(), 2U);
  }
}

TEST(Balancer, ShowsWhatTheGroupDid) {
  BalancedGroup group({.step_interval = 1'000'000, .steps = 80, .min_changes = 0});  // no rebalance, one report
  const std::shared_ptr<const eplb::LoadReport> report = group.balancer(0).load_report();
  ASSERT_NE(report, nullptr);
  for (size_t r = 1; r < 4; ++r) EXPECT_EQ(group.balancer(r).load_report(), nullptr);
  EXPECT_EQ(report->steps, 16);
  EXPECT_EQ(report->changes, 0U);
  EXPECT_FALSE(report->planned.has_value());
  // 4 ranks, 8 rows of 3 experts each; the favourite has a slot of every row.
  for (int64_t l = 0; l < 2; ++l) {
    EXPECT_EQ(report->load.layer(l)[static_cast<size_t>(l)], 16 * 4 * kRows);
    EXPECT_EQ(std::accumulate(report->load.layer(l).begin(), report->load.layer(l).end(), int64_t{0}), 16 * 4 * kRows * 3);
  }
  EXPECT_LT(report->balance.overall, 1);
  const std::vector<double> tokens = eplb::total_rank_loads(*report);
  EXPECT_EQ(std::accumulate(tokens.begin(), tokens.end(), 0.0), 2 * 16 * 4 * kRows * 3);
  const std::string metrics = group.metrics(0);
  for (const char* series : {"tandem:eplb_balancedness{placement=\"measured\",layers=\"p99\"}",
                             "tandem:eplb_balancedness{placement=\"planned\",layers=\"overall\"} 1\n",
                             "tandem:eplb_layer_balancedness{layer=\"3\"} 0.", "tandem:eplb_rank_tokens{rank=\"3\"} "}) {
    EXPECT_THAT(metrics, testing::HasSubstr(series));
  }
  EXPECT_THAT(group.metrics(1), testing::Not(testing::HasSubstr("eplb_balancedness")));
}

TEST(Balancer, ARebalanceShowsWhatItPlanned) {
  BalancedGroup group({});
  const std::shared_ptr<const eplb::LoadReport> report = group.balancer(0).load_report();
  ASSERT_NE(report, nullptr);
  ASSERT_TRUE(report->planned.has_value());
  EXPECT_GT(report->planned->overall, 0.9);
}

}  // namespace
}  // namespace tandem::ep
