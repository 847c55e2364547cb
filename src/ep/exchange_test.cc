// Rows of many ranks, computed where their experts are, against one rank that has all experts: bit for bit.
#include "src/ep/exchange.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <latch>
#include <map>

#include "src/ep/limits.h"
#include "src/ep/test_support.h"

namespace tandem::ep {
namespace {

using testing::HasSubstr;

constexpr All2All kBackends[] = {All2All::kNaive, All2All::kAllGather, All2All::kHighThroughput,
                                 All2All::kLowLatency};
constexpr int64_t kMaxTestRows = 12;

struct Case {
  std::string kernels = "auto";
  int32_t ranks = 4;
  ExchangeOptions options;
  int64_t steps = 4;
  Routing routing = Routing::kRandom;
  bool delays = false;
};

// Inputs of every step, layer and rank; some ranks are idle in some steps.
std::vector<std::vector<RankInput>> make_inputs(kernels::Random& random, const TestExperts& experts, const Case& test) {
  std::vector<std::vector<RankInput>> inputs;
  for (int64_t e = 0; e < test.steps * experts.num_layers; ++e) {
    std::vector<RankInput> of_ranks;
    for (int32_t r = 0; r < test.ranks; ++r) {
      const int64_t rows = random.integer(0, 2) == 0 ? 0 : random.integer(1, kMaxTestRows);
      of_ranks.push_back(make_input(random, experts, rows, test.routing));
    }
    inputs.push_back(std::move(of_ranks));
  }
  return inputs;
}

std::vector<std::unique_ptr<TestRank>> make_ranks(const Case& test, const TestExperts& experts) {
  std::vector<std::unique_ptr<TestRank>> ranks;
  for (int32_t r = 0; r < test.ranks; ++r) {
    ranks.push_back(std::make_unique<TestRank>(test.kernels, experts,
                                               make_shard(r, test.ranks, experts.num_experts), test.options,
                                               kMaxTestRows));
  }
  return ranks;
}

int64_t window_bytes(const Case& /*test*/, TestRank& rank) { return rank.exchange().window_end(); }

void expect_bits_of_one_rank(const Case& test, TestExperts experts, kernels::Random& random) {
  experts.fill(random);
  const std::vector<std::vector<RankInput>> inputs = make_inputs(random, experts, test);
  Device device(test.kernels);
  std::vector<int32_t> all(static_cast<size_t>(experts.num_experts));
  std::iota(all.begin(), all.end(), 0);
  const PackedExperts packed(device, experts, all);
  std::vector<std::unique_ptr<TestRank>> ranks = make_ranks(test, experts);
  group::ThreadGroup threads(test.ranks, window_bytes(test, *ranks[0]));
  const uint64_t seed = static_cast<uint64_t>(random.integer(0, 1'000'000));
  std::vector<std::vector<Matrix<float>>> results(static_cast<size_t>(test.ranks));
  threads.run([&](group::Fabric& fabric) {
    const size_t r = static_cast<size_t>(fabric.rank().value);
    ranks[r]->exchange().attach(fabric);
    if (test.delays) ranks[r]->set_delays(seed + r);
    for (size_t e = 0; e < inputs.size(); ++e) {
      const size_t layer = e % static_cast<size_t>(experts.num_layers);
      Result<Matrix<float>> out = ranks[r]->run(layer, inputs[e][r]);
      ASSERT_TRUE(out.ok()) << out.error().message;
      results[r].push_back(std::move(out).value());
    }
    ranks[r]->exchange().detach();
  });
  for (size_t e = 0; e < inputs.size(); ++e) {
    for (size_t r = 0; r < results.size(); ++r) {
      const size_t layer = e % static_cast<size_t>(experts.num_layers);
      ASSERT_EQ(results[r].size(), inputs.size());
      ASSERT_TRUE(same_bits(results[r][e], run_alone(device, experts, packed, layer, inputs[e][r],
                                                     test.options.row_format)))
          << all2all_name(test.options.backend) << ' ' << test.ranks << " ranks, exchange " << e << ", rank " << r << ", "
          << kernels::weight_format_name(experts.format);
    }
  }
  for (const std::unique_ptr<TestRank>& rank : ranks) {
    if (test.options.max_slots > 0) {
      EXPECT_LE(rank->most_slots(), test.options.max_slots);
    }
  }
}

TEST(Exchange, EveryBackendGivesTheBitsOfOneRank) {
  kernels::Random random(41);
  for (const All2All backend : kBackends) {
    for (const int32_t ranks : {1, 2, 3, 4, 8}) {
      TestExperts experts;
      experts.num_experts = ranks == 8 ? 11 : 7;  // not the same number everywhere
      expect_bits_of_one_rank({.ranks = ranks, .options = {.backend = backend, .window_offset = 128}}, experts, random);
    }
  }
}

TEST(Exchange, EveryFormatOfWeights) {
  kernels::Random random(42);
  for (const std::string& kernels : kernels::available_backends()) {
    for (const All2All backend : kBackends) {
      for (const WeightFormat format : kernels::kTestedFormats) {
        TestExperts experts;
        experts.format = format;
        expect_bits_of_one_rank({.kernels = kernels, .ranks = 3, .options = {.backend = backend}, .steps = 2}, experts,
                                random);
      }
    }
  }
}

TEST(Exchange, LossyRowsAreTheSameWithEveryBackend) {
  kernels::Random random(43);
  for (const RowFormat row_format : {RowFormat::kBf16, RowFormat::kInt8, RowFormat::kF8E4M3}) {
    for (const All2All backend : kBackends) {
      for (const WeightFormat format : {kernels::kF32Weights, kernels::kBf16Weights, kernels::kTestedFormats[3]}) {
        TestExperts experts;
        experts.format = format;
        expect_bits_of_one_rank({.ranks = 3, .options = {.backend = backend, .row_format = row_format}, .steps = 2},
                                experts, random);
      }
    }
  }
}

TEST(Exchange, AllRowsToOneRank) {
  kernels::Random random(44);
  for (const All2All backend : kBackends) {
    for (const Routing routing : {Routing::kFirstExperts, Routing::kLastExperts}) {
      TestExperts experts;
      experts.num_experts = 12;
      expect_bits_of_one_rank({.options = {.backend = backend}, .routing = routing}, experts, random);
    }
  }
}

TEST(Exchange, SmallAreasTakeSeveralRounds) {
  kernels::Random random(45);
  for (const All2All backend : kBackends) {
    for (const int64_t size : {1, 3, 7}) {
      for (const Routing routing : {Routing::kRandom, Routing::kLastExperts}) {
        expect_bits_of_one_rank({.options = {.backend = backend, .max_slots = size, .received_rows = size},
                                 .routing = routing,
                                 .delays = true},
                                TestExperts{}, random);
      }
    }
  }
}

TEST(Exchange, RanksThatMeetInAllOrders) {
  kernels::Random random(46);
  for (const All2All backend : kBackends) {
    for (const int32_t ranks : {2, 4}) {
      expect_bits_of_one_rank(
          {.ranks = ranks, .options = {.backend = backend}, .steps = 40, .delays = true}, TestExperts{}, random);
    }
  }
}

// Rank 1 has sent nothing in the first exchange and is in the second one already when rank 0 looks.
TEST(Exchange, ACounterThatIsAheadSaysNothingWasSent) {
  kernels::Random random(52);
  const Case test{.ranks = 2, .options = {.backend = All2All::kLowLatency}};
  TestExperts experts;
  experts.fill(random);
  std::vector<std::unique_ptr<TestRank>> ranks = make_ranks(test, experts);
  group::ThreadGroup threads(2, window_bytes(test, *ranks[0]));
  const auto dispatch = [&](size_t r, int64_t layer, int64_t rows) {
    Device& device = ranks[r]->device();
    const RankInput input = make_input(random, experts, rows, Routing::kFirstExperts);  // those of rank 0
    ASSERT_TRUE(ranks[r]->exchange().dispatch(layer, device.put(input.x), device.put(input.ids)).ok());
  };
  for (size_t r = 0; r < 2; ++r) ranks[r]->exchange().attach(threads.fabric(static_cast<int32_t>(r)));
  dispatch(0, 0, 2);
  dispatch(1, 0, 0);
  EXPECT_EQ(ranks[1]->exchange().receive()->count, 0);
  EXPECT_EQ(ranks[1]->exchange().collect()->rows, 0);
  dispatch(1, 1, 5);
  EXPECT_EQ(ranks[0]->exchange().receive()->count, 2 * experts.top_k);
  ASSERT_TRUE(ranks[0]->exchange().give_back().ok());
  EXPECT_EQ(ranks[0]->exchange().receive()->count, 0);
  EXPECT_EQ(ranks[0]->exchange().collect()->rows, 2 * experts.top_k);
  dispatch(0, 1, 0);
  EXPECT_EQ(ranks[0]->exchange().receive()->count, 5 * experts.top_k);
  for (size_t r = 0; r < 2; ++r) ranks[r]->exchange().detach();
}

// Windows of other ranks are not mapped: what is put stays with the sender until the fabric must bring it over.
class RemoteFabric final : public group::Fabric {
 public:
  explicit RemoteFabric(group::Fabric& mapped) : mapped_(mapped) {}
  group::RankId rank() const override { return mapped_.rank(); }
  int32_t size() const override { return mapped_.size(); }
  group::Epoch epoch() const override { return mapped_.epoch(); }
  std::span<std::byte> window() override { return mapped_.window(); }
  std::byte* direct(group::RankId to) override { return to == rank() ? mapped_.direct(to) : nullptr; }
  void put(group::RankId to, int64_t offset, std::span<const std::byte> data) override {
    puts_[to.value].push_back({offset, data});
  }
  Status flush() override {
    for (int32_t to = 0; to < size(); ++to) deliver(to);
    return mapped_.flush();
  }
  void signal(group::RankId to, group::Channel channel, uint64_t value) override {
    deliver(to.value);
    mapped_.signal(to, channel, value);
  }
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
  struct Put {
    int64_t offset;
    std::span<const std::byte> data;
  };
  void deliver(int32_t to) {
    for (const Put& put : puts_[to]) mapped_.put(group::RankId(to), put.offset, put.data);
    puts_[to].clear();
  }
  group::Fabric& mapped_;
  std::map<int32_t, std::vector<Put>> puts_;
};

// Two exchanges at once, one behind the other in each of their steps; now and then the first lane alone.
void expect_bits_of_one_rank_in_two_lanes(All2All backend, bool is_remote, kernels::Random& random) {
  Case test{.ranks = 4, .options = {.backend = backend, .max_slots = 10, .received_rows = 5, .num_lanes = 2}, .steps = 10};
  test.options.window_offset = 64;
  TestExperts experts;
  experts.fill(random);
  std::vector<std::vector<std::vector<RankInput>>> inputs{make_inputs(random, experts, test)};  // per lane
  inputs.push_back(inputs[0]);
  std::vector<bool> has_two;
  for (std::vector<RankInput>& of_ranks : inputs[1]) {
    has_two.push_back(random.integer(0, 3) != 0);
    for (RankInput& input : of_ranks) {
      input = make_input(random, experts, random.integer(0, kMaxTestRows / 2), Routing::kRandom);
    }
  }
  Device device(test.kernels);
  const PackedExperts packed(device, experts, std::vector<int32_t>{0, 1, 2, 3, 4, 5});
  std::vector<std::unique_ptr<TestRank>> ranks = make_ranks(test, experts);
  group::ThreadGroup threads(test.ranks, window_bytes(test, *ranks[0]));
  const uint64_t seed = static_cast<uint64_t>(random.integer(0, 1'000'000));
  std::array<std::vector<std::vector<Matrix<float>>>, 2> results;
  for (auto& of_lane : results) of_lane.resize(static_cast<size_t>(test.ranks));
  threads.run([&](group::Fabric& mapped) {
    RemoteFabric remote(mapped);
    group::Fabric& fabric = is_remote ? static_cast<group::Fabric&>(remote) : mapped;
    const size_t r = static_cast<size_t>(fabric.rank().value);
    TestRank& rank = *ranks[r];
    rank.exchange().attach(fabric);
    rank.set_delays(seed + r);
    for (size_t e = 0; e < has_two.size(); ++e) {
      const int lanes = has_two[e] ? 2 : 1;
      for (int l = 0; l < lanes; ++l) ASSERT_TRUE(rank.send(l, e % 2, inputs[static_cast<size_t>(l)][e][r]).ok());
      for (int l = 0; l < lanes; ++l) ASSERT_TRUE(rank.compute(l, e % 2).ok());
      for (int l = 0; l < lanes; ++l) results[static_cast<size_t>(l)][r].push_back(rank.finish(l).value());
      if (lanes == 1) results[1][r].emplace_back();
    }
    rank.exchange().detach();
  });
  for (size_t lane = 0; lane < 2; ++lane) {
    for (size_t e = 0; e < has_two.size(); ++e) {
      for (size_t r = 0; r < ranks.size(); ++r) {
        if (lane == 1 && !has_two[e]) continue;
        const Matrix<float> alone = run_alone(device, experts, packed, e % 2, inputs[lane][e][r], test.options.row_format);
        ASSERT_TRUE(same_bits(results[lane][r][e], alone))
            << all2all_name(backend) << (is_remote ? " remote" : "") << ", lane " << lane << ", exchange " << e << ", rank "
            << r << ", delays " << seed;
      }
    }
  }
  // What both lanes sent is counted.
  for (size_t r = 0; r < ranks.size(); ++r) {
    eplb::ExpertLoad counts(experts.num_layers, experts.num_experts);
    ranks[r]->exchange().take_counts(counts);
    int64_t rows = 0;
    for (size_t e = 0; e < has_two.size(); ++e) rows += inputs[0][e][r].x.rows + (has_two[e] ? inputs[1][e][r].x.rows : 0);
    EXPECT_EQ(counts.total(), rows * experts.top_k);
  }
}

TEST(Exchange, TwoLanesDoNotDisturbEachOther) {
  for (int repeat = 0; repeat < 3; ++repeat) {
    kernels::Random random(static_cast<uint64_t>(60 + repeat));
    for (const All2All backend : kBackends) {
      for (const bool is_remote : {false, true}) expect_bits_of_one_rank_in_two_lanes(backend, is_remote, random);
    }
  }
}

TEST(Exchange, ReachesRanksWhoseWindowsAreNotMapped) {
  kernels::Random random(47);
  for (const All2All backend : kBackends) {
    const Case test{.ranks = 3, .options = {.backend = backend, .max_slots = 10, .received_rows = 5}, .steps = 6};
    TestExperts experts;
    experts.fill(random);
    const std::vector<std::vector<RankInput>> inputs = make_inputs(random, experts, test);
    Device device(test.kernels);
    const PackedExperts packed(device, experts, std::vector<int32_t>{0, 1, 2, 3, 4, 5});
    std::vector<std::unique_ptr<TestRank>> ranks = make_ranks(test, experts);
    group::ThreadGroup threads(test.ranks, window_bytes(test, *ranks[0]));
    std::vector<std::vector<Matrix<float>>> results(static_cast<size_t>(test.ranks));
    threads.run([&](group::Fabric& mapped) {
      RemoteFabric fabric(mapped);
      const size_t r = static_cast<size_t>(fabric.rank().value);
      ranks[r]->exchange().attach(fabric);
      for (size_t e = 0; e < inputs.size(); ++e) results[r].push_back(ranks[r]->run(e % 2, inputs[e][r]).value());
      ranks[r]->exchange().detach();
    });
    for (size_t e = 0; e < inputs.size(); ++e) {
      for (size_t r = 0; r < results.size(); ++r) {
        ASSERT_TRUE(same_bits(results[r][e],
                              run_alone(device, experts, packed, e % 2, inputs[e][r], RowFormat::kExact)))
            << all2all_name(backend) << " exchange " << e << " rank " << r;
      }
    }
  }
}

// Some experts are on two ranks, and lie in an order of their own.
TEST(Exchange, CopiesOfExpertsChangeNoBit) {
  kernels::Random random(48);
  TestExperts experts;
  experts.fill(random);
  const std::vector<int32_t> expert_of_slot = {3, 0, 5, 1, 3, 4, 2, 0, 3};
  constexpr int32_t kRanks = 3;
  for (const All2All backend : kBackends) {
    const Case test{.ranks = kRanks, .options = {.backend = backend}, .steps = 6};
    const std::vector<std::vector<RankInput>> inputs = make_inputs(random, experts, test);
    Device device(test.kernels);
    const PackedExperts packed(device, experts, std::vector<int32_t>{0, 1, 2, 3, 4, 5});
    std::vector<std::unique_ptr<TestRank>> ranks;
    for (int32_t r = 0; r < kRanks; ++r) {
      const auto first = expert_of_slot.begin() + r * 3;
      ranks.push_back(std::make_unique<TestRank>(
          test.kernels, experts, model::ExpertShard{r, kRanks, {first, first + 3}}, test.options, kMaxTestRows));
      for (int64_t l = 0; l < experts.num_layers; ++l) {
        ranks.back()->exchange().set_map(l, ExpertMap(expert_of_slot, kRanks, experts.num_experts));
      }
    }
    group::ThreadGroup threads(kRanks, window_bytes(test, *ranks[0]));
    std::vector<std::vector<Matrix<float>>> results(kRanks);
    threads.run([&](group::Fabric& fabric) {
      const size_t r = static_cast<size_t>(fabric.rank().value);
      ranks[r]->exchange().attach(fabric);
      for (size_t e = 0; e < inputs.size(); ++e) results[r].push_back(ranks[r]->run(e % 2, inputs[e][r]).value());
    });
    for (size_t e = 0; e < inputs.size(); ++e) {
      for (size_t r = 0; r < results.size(); ++r) {
        ASSERT_TRUE(same_bits(results[r][e],
                              run_alone(device, experts, packed, e % 2, inputs[e][r], RowFormat::kExact)));
      }
    }
  }
}

// A rank stops in the middle of an exchange. As its group would, somebody ends the epoch on all the others: they come
// back with the reason, and over a new fabric the same exchanges work again.
TEST(Exchange, AnEndedEpochEndsOnEveryRankAndTheNextWorks) {
  kernels::Random random(49);
  for (const All2All backend : kBackends) {
    const Case test{.options = {.backend = backend, .received_rows = 4}};
    TestExperts experts;
    experts.fill(random);
    Device device(test.kernels);
    const PackedExperts packed(device, experts, std::vector<int32_t>{0, 1, 2, 3, 4, 5});
    std::vector<std::unique_ptr<TestRank>> ranks = make_ranks(test, experts);
    for (int32_t lost = 0; lost < test.ranks; ++lost) {
      std::vector<RankInput> inputs;
      for (int32_t r = 0; r < test.ranks; ++r) inputs.push_back(make_input(random, experts, 5 + r, Routing::kRandom));
      group::ThreadGroup first(test.ranks, window_bytes(test, *ranks[0]));
      std::latch all_ran(test.ranks);
      first.run([&](group::Fabric& fabric) {
        const size_t r = static_cast<size_t>(fabric.rank().value);
        Exchange& exchange = ranks[r]->exchange();
        exchange.attach(fabric);
        EXPECT_TRUE(ranks[r]->run(0, inputs[r]).ok());
        all_ran.arrive_and_wait();
        if (fabric.rank().value == lost) {
          std::this_thread::sleep_for(std::chrono::milliseconds(10));
          for (int32_t other = 0; other < test.ranks; ++other) {
            first.fabric(other).end(make_error(ErrorKind::kUnavailable, "rank {} is gone", lost));
          }
          EXPECT_FALSE(ranks[r]->run(1, inputs[r]).ok());
        } else {
          const Result<Matrix<float>> out = ranks[r]->run(1, inputs[r]);
          ASSERT_FALSE(out.ok());
          EXPECT_EQ(out.error().kind, ErrorKind::kUnavailable);
          EXPECT_EQ(out.error().message, fmt::format("rank {} is gone", lost));
          EXPECT_FALSE(ranks[r]->run(0, inputs[r]).ok());  // it stays void
        }
        exchange.detach();
        EXPECT_FALSE(ranks[r]->run(0, inputs[r]).ok());
      });
      group::ThreadGroup second(test.ranks, window_bytes(test, *ranks[0]));
      second.run([&](group::Fabric& fabric) {
        const size_t r = static_cast<size_t>(fabric.rank().value);
        ranks[r]->exchange().attach(fabric);
        for (size_t layer = 0; layer < 2; ++layer) {
          const Result<Matrix<float>> out = ranks[r]->run(layer, inputs[r]);
          ASSERT_TRUE(out.ok()) << out.error().message;
          Device own(test.kernels);
          const PackedExperts all(own, experts, std::vector<int32_t>{0, 1, 2, 3, 4, 5});
          EXPECT_TRUE(same_bits(*out, run_alone(own, experts, all, layer, inputs[r], RowFormat::kExact)));
        }
        ranks[r]->exchange().detach();
      });
    }
  }
}

TEST(Exchange, NamesARankThatNeverComes) {
  kernels::Random random(50);
  for (const All2All backend : kBackends) {
    const Case test{.ranks = 2, .options = {.backend = backend}};
    TestExperts experts;
    experts.fill(random);
    std::vector<std::unique_ptr<TestRank>> ranks = make_ranks(test, experts);
    group::ThreadGroup threads(2, window_bytes(test, *ranks[0]), group::FabricLimits{.rank_timeout_us = 50'000});
    ranks[0]->exchange().attach(threads.fabric(0));
    const Result<Matrix<float>> out = ranks[0]->run(0, make_input(random, experts, 4, Routing::kRandom));
    ASSERT_FALSE(out.ok());
    EXPECT_EQ(out.error().kind, ErrorKind::kUnavailable);
    EXPECT_THAT(out.error().message, HasSubstr("rank 1 has shown no sign of life"));
    ranks[0]->exchange().detach();
  }
}

TEST(Exchange, RefusesWhatNoPeerCanMean) {
  kernels::Random random(51);
  const Case test{.ranks = 2, .options = {.backend = All2All::kLowLatency}};
  TestExperts experts;
  experts.fill(random);
  std::vector<std::unique_ptr<TestRank>> ranks = make_ranks(test, experts);
  const RankInput input = make_input(random, experts, 4, Routing::kRandom);
  const WindowPlan& plan = ranks[0]->exchange().plan();
  const auto run_after = [&](const std::vector<int32_t>& tag, int64_t count) {
    group::ThreadGroup threads(2, window_bytes(test, *ranks[0]));
    group::Fabric& peer = threads.fabric(1);
    peer.put(group::RankId(0), plan.record_offset(plan.first_received(1)) + plan.tag_offset(),
             std::as_bytes(std::span(tag)));
    peer.signal(group::RankId(0), group::Channel::kDispatch, count_value(1, count));
    ranks[0]->exchange().attach(threads.fabric(0));
    const Result<Matrix<float>> out = ranks[0]->run(0, input);
    ranks[0]->exchange().detach();
    EXPECT_FALSE(out.ok());
    return out.ok() ? Error{} : out.error();
  };
  EXPECT_THAT(run_after({0, 0, 1, 2}, kMaxTestRows + 1).message, HasSubstr("rank 1 has sent 13 rows at once"));
  const Error row = run_after({kMaxTestRows, 0, 1, 2}, 1);
  EXPECT_EQ(row.kind, ErrorKind::kDataLoss);
  EXPECT_THAT(row.message, HasSubstr("of row 12; a step has at most 12"));
}

TEST(WindowPlan, PiecesDoNotOverlap) {
  Device device("auto");
  TestExperts experts;
  const model::ExchangeShape shape = TestRank::shape(experts, 100);
  for (const All2All backend : kBackends) {
    const WindowPlan plan = plan_window({.backend = backend}, device.ops(), shape, 4);
    EXPECT_GE(plan.records, backend == All2All::kHighThroughput ? 2 * 4 * 4 * 4 : 0);
    EXPECT_GE(plan.outputs, plan.records + plan.num_records * plan.record_bytes);
    EXPECT_GE(plan.bytes, plan.outputs + 100 * experts.top_k * experts.hidden * 4);
    EXPECT_EQ(plan.record_bytes % 64, 0);
    EXPECT_EQ(plan.outputs % 64, 0);
  }
  EXPECT_EQ(plan_window({.backend = All2All::kLowLatency}, device.ops(), shape, 4).num_records, 400);
  EXPECT_EQ(plan_window({.backend = All2All::kHighThroughput}, device.ops(), shape, 4).num_records, 300);
  EXPECT_EQ(plan_window({.backend = All2All::kNaive}, device.ops(), shape, 4).num_records, 200);
}

}  // namespace
}  // namespace tandem::ep
