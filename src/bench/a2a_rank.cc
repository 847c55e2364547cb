#include "src/bench/a2a_rank.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "src/base/check.h"
#include "src/ep/exchange.h"
#include "src/kernels/ops.h"

namespace tandem::bench {
namespace {

using Time = std::chrono::steady_clock;
using group::RankId;
using kernels::DType;
using kernels::Tensor;

double us_since(Time::time_point begin) {
  return std::chrono::duration<double, std::micro>(Time::now() - begin).count();
}

class A2aRank {
 public:
  A2aRank(const A2aRankOptions& options, group::Fabric& fabric, PlainCopy& plain, A2aBoard& board, A2aRecord& record)
      : bench_(*options.bench),
        tokens_(options.tokens),
        fabric_(fabric),
        plain_(plain),
        board_(board),
        record_(record),
        ops_(kernels::make_ops("auto", 1).value()),
        stream_(ops_->make_stream()),
        exchange_(ep::make_shard(fabric.rank().value, fabric.size(), static_cast<int32_t>(bench_.num_experts)),
                  a2a_exchange_options(bench_, options.backend, fabric.size(), tokens_)),
        hidden_(*ops_, DType::kF32, tokens_, bench_.hidden),
        ids_(*ops_, DType::kI32, tokens_, bench_.top_k),
        traffic_(static_cast<size_t>(fabric.size())) {
    exchange_.prepare(*ops_, *stream_, a2a_shape(bench_, tokens_));
    exchange_.attach(fabric_);
    make_rows();
  }

  Status run() {
    const Time::time_point begin = Time::now();
    for (int64_t round = -kA2aWarmups; round < kMaxA2aRounds; ++round) {
      TANDEM_TRY(run_round(round));
      const int64_t done = std::max(int64_t{0}, round + 1);
      if (rank() == 0) {
        board_.stop = done >= kMinA2aRounds && us_since(begin) > bench_.seconds * 1e6;
        board_.rounds = done;
      }
      meet();
      if (board_.stop) break;
    }
    record_.is_done = true;
    return {};
  }

 private:
  // Bytes in a round between this rank and another.
  struct Traffic {
    int64_t rows_to = 0;
    int64_t rows_from = 0;
    int64_t outputs_to = 0;
    int64_t outputs_from = 0;
  };

  static constexpr int64_t kLine = 64;
  static constexpr int64_t kLooksBeforeYield = 20'000;  // well below a millisecond

  void make_rows() {
    std::mt19937_64 random(bench_.seed * 1000 + static_cast<uint64_t>(fabric_.rank().value));
    std::normal_distribution<float> normal;
    rows_.resize(static_cast<size_t>(tokens_ * bench_.hidden));
    for (float& value : rows_) value = normal(random);
    for (int32_t r = 0; r < fabric_.size(); ++r) {
      std::vector<int32_t> chosen = choose_experts(r);
      count_traffic(r, chosen);
      if (r == rank()) chosen_ = std::move(chosen);
    }
    ops_->upload(*stream_, ids_.all().address, std::as_bytes(std::span(chosen_)));
    ops_->synchronize(*stream_);
  }

  // As the norm before the experts would, a moment before.
  void write_hidden() {
    ops_->upload(*stream_, hidden_.all().address, std::as_bytes(std::span(rows_)));
    ops_->synchronize(*stream_);
  }

  // Of all rows of `owner`, [T, k]; each rank can tell what the others choose.
  std::vector<int32_t> choose_experts(int32_t owner) const {
    std::mt19937_64 random(bench_.seed * 1000 + static_cast<uint64_t>(owner) + 1'000'000);
    std::vector<int32_t> experts(static_cast<size_t>(bench_.num_experts));
    std::iota(experts.begin(), experts.end(), 0);
    std::vector<int32_t> chosen;
    for (int64_t t = 0; t < tokens_; ++t) {
      std::shuffle(experts.begin(), experts.end(), random);
      chosen.insert(chosen.end(), experts.begin(), experts.begin() + bench_.top_k);
    }
    return chosen;
  }

  // Adds what passes between this rank and others because of the rows of `owner`.
  void count_traffic(int32_t owner, const std::vector<int32_t>& chosen) {
    const ep::WindowPlan& plan = exchange_.plan();
    const bool sends_all = plan.backend == ep::All2All::kAllGather || plan.backend == ep::All2All::kNaive;
    const ep::ExpertMap map = ep::ExpertMap::contiguous(fabric_.size(), static_cast<int32_t>(bench_.num_experts));
    for (int64_t t = 0; t < tokens_; ++t) {
      std::vector<int64_t> outputs_of(traffic_.size(), 0);
      for (int64_t j = 0; j < bench_.top_k; ++j) {
        const int32_t expert = chosen[static_cast<size_t>(t * bench_.top_k + j)];
        ++outputs_of[static_cast<size_t>(map.slot_of(expert, 0) / map.slots_per_rank())];
      }
      for (int32_t holder = 0; holder < fabric_.size(); ++holder) {
        const int64_t outputs = outputs_of[static_cast<size_t>(holder)];
        if (holder == owner || (holder != rank() && owner != rank())) continue;
        const int64_t record_bytes = sends_all || outputs > 0 ? plan.record_bytes : 0;
        Traffic& traffic = traffic_[static_cast<size_t>(owner == rank() ? holder : owner)];
        (owner == rank() ? traffic.rows_to : traffic.rows_from) += record_bytes;
        (owner == rank() ? traffic.outputs_from : traffic.outputs_to) += outputs * output_bytes();
      }
    }
  }

  // All ranks leave it together. It looks without sleeping, so that nobody begins late by the time that waking takes.
  void meet() {
    ++meetings_;
    board_.arrived.fetch_add(1);
    for (int64_t look = 0; board_.arrived.load() < meetings_ * fabric_.size(); ++look) {
      if (look > kLooksBeforeYield) ::sched_yield();
    }
  }

  void note(int64_t round, A2aPhase phase, double us) {
    if (round >= 0) record_.us[round][phase] = us;
  }

  Status run_round(int64_t round) {
    write_hidden();
    meet();
    double dispatch_us = 0;
    double combine_us = 0;
    Time::time_point begin = Time::now();
    TANDEM_TRY(exchange_.dispatch(0, hidden_.all(), ids_.all()));
    TANDEM_ASSIGN(model::ReceivedSlots received, exchange_.receive());
    dispatch_us += us_since(begin);
    if (received.count > 0) compute(received, round);
    // But for naive, all rows come in one batch, so that combine can begin everywhere at once.
    if (!has_turns()) meet();
    while (received.count > 0) {
      begin = Time::now();
      place_outputs(received);
      TANDEM_TRY(exchange_.give_back());
      combine_us += us_since(begin);
      begin = Time::now();
      TANDEM_ASSIGN(received, exchange_.receive());
      (has_turns() ? dispatch_us : combine_us) += us_since(begin);
      if (received.count > 0) compute(received, round);
    }
    begin = Time::now();
    TANDEM_ASSIGN(const Tensor out, exchange_.collect());
    combine_us += us_since(begin);
    note(round, kA2aDispatch, dispatch_us);
    note(round, kA2aCombine, combine_us);
    read_outputs(out, round);
    encode_alone(round);
    return copy_plainly(round);
  }

  bool has_turns() const { return exchange_.plan().backend == ep::All2All::kNaive; }

  // Stands for the experts: reads the rows; each output begins with the number of its expert. Own outputs would be
  // written where they belong; here that is done once, to be checked. Those for ranks that are not mapped go into the
  // exchange's buffer.
  void compute(const model::ReceivedSlots& received, int64_t round) {
    const int64_t hidden = bench_.hidden;
    if (outputs_.all().rows < received.count) {
      outputs_ = model::DeviceTensor(*ops_, DType::kF32, received.count, hidden);
    }
    float* const outputs = reinterpret_cast<float*>(outputs_.all().address);
    const int32_t* const offsets = reinterpret_cast<const int32_t*>(received.offsets.address);
    const int32_t* const order = reinterpret_cast<const int32_t*>(received.order.address);
    const std::vector<int32_t>& experts = exchange_.shard().slots;
    for (size_t e = 0; e < experts.size(); ++e) {
      for (int64_t place = offsets[e]; place < offsets[e + 1]; ++place) {
        outputs[place * hidden] = static_cast<float>(experts[e]);
        read(received.rows.rows.address + order[place] / bench_.top_k * received.rows.rows.stride,
             received.rows.rows.cols);
        const int32_t at = window_of(received, place);
        if (at < 0 || (round == -kA2aWarmups && at == rank())) copy_output(received, place);
      }
    }
  }

  void place_outputs(const model::ReceivedSlots& received) {
    for (int64_t place = 0; place < received.count; ++place) {
      const int32_t at = window_of(received, place);
      if (at >= 0 && at != rank()) copy_output(received, place);
    }
  }

  void copy_output(const model::ReceivedSlots& received, int64_t place) {
    const int64_t target = reinterpret_cast<const int64_t*>(received.targets.address)[place];
    std::memcpy(received.out + target, outputs_.all().address + place * output_bytes(),
                static_cast<size_t>(output_bytes()));
  }

  // As the sum over slots would, so that the next writer finds the memory in another core's cache.
  void read_outputs(const Tensor& out, int64_t round) {
    read(out.address, out.bytes());
    if (round != -kA2aWarmups) return;
    const float* const values = reinterpret_cast<const float*>(out.address);
    for (size_t slot = 0; slot < chosen_.size(); ++slot) {
      CHECK_EQ(values[static_cast<int64_t>(slot) * bench_.hidden], static_cast<float>(chosen_[slot]));
    }
  }

  // What of dispatch one rank alone would do as well: its experts take rows in that form, too.
  void encode_alone(int64_t round) {
    const ep::WindowPlan& plan = exchange_.plan();
    if (encoded_.bytes() == 0) encoded_ = model::DeviceTensor(*ops_, DType::kU8, tokens_, plan.row_bytes);
    write_hidden();
    meet();
    const Time::time_point begin = Time::now();
    ops_->encode_expert_rows(*stream_, hidden_.all(), bench_.weights, {encoded_.all(), bench_.row_format});
    ops_->synchronize(*stream_);
    note(round, kA2aEncode, us_since(begin));
  }

  // The bytes of dispatch and of combine, each in one piece per peer.
  Status copy_plainly(int64_t round) {
    std::vector<int64_t> rows_to;
    std::vector<int64_t> rows_from;
    std::vector<int64_t> outputs_to;
    std::vector<int64_t> outputs_from;
    for (const Traffic& traffic : traffic_) {
      rows_to.push_back(traffic.rows_to);
      rows_from.push_back(traffic.rows_from);
      outputs_to.push_back(traffic.outputs_to);
      outputs_from.push_back(traffic.outputs_from);
    }
    record_.dispatch_bytes = std::accumulate(rows_to.begin(), rows_to.end(), int64_t{0});
    record_.combine_bytes = std::accumulate(outputs_to.begin(), outputs_to.end(), int64_t{0});
    const int64_t most = std::max(record_.dispatch_bytes, record_.combine_bytes);
    if (copied_.bytes() < most) copied_ = model::DeviceTensor(*ops_, DType::kU8, most, 1);
    std::memset(copied_.all().address, static_cast<int>(round), static_cast<size_t>(record_.dispatch_bytes));
    TANDEM_ASSIGN(const double dispatch_us, exchange_plainly(rows_to, rows_from));
    note(round, kA2aPlainDispatch, dispatch_us);
    TANDEM_ASSIGN(const double combine_us, exchange_plainly(outputs_to, outputs_from));
    note(round, kA2aPlainCombine, combine_us);
    return {};
  }

  Result<double> exchange_plainly(std::span<const int64_t> bytes_to, std::span<const int64_t> bytes_from) {
    const ep::WindowPlan& plan = exchange_.plan();
    meet();
    const Time::time_point begin = Time::now();
    TANDEM_TRY(plain_.exchange({copied_.all().address, static_cast<size_t>(copied_.bytes())}, bytes_to, bytes_from));
    const double us = us_since(begin);
    meet();
    read(fabric_.window().data() + plan.outputs, plan.bytes - plan.outputs);
    return us;
  }

  void read(const std::byte* memory, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += kLine) sink_ += static_cast<uint64_t>(memory[at]);
  }

  // Whose window a place's target lies in; -1: in none, so a network brings it there.
  int32_t window_of(const model::ReceivedSlots& received, int64_t place) {
    const std::byte* const target = reinterpret_cast<const std::byte*>(
        received.out + reinterpret_cast<const int64_t*>(received.targets.address)[place]);
    for (int32_t r = 0; r < fabric_.size(); ++r) {
      const std::byte* const window = fabric_.direct(RankId(r));
      if (window != nullptr && target >= window && target < window + std::ssize(fabric_.window())) return r;
    }
    return -1;
  }

  int32_t rank() const { return fabric_.rank().value; }
  int64_t output_bytes() const { return bench_.hidden * int64_t{sizeof(float)}; }

  const A2aBenchOptions& bench_;
  const int64_t tokens_;
  group::Fabric& fabric_;
  PlainCopy& plain_;
  A2aBoard& board_;
  A2aRecord& record_;
  std::unique_ptr<kernels::Ops> ops_;
  std::unique_ptr<kernels::Stream> stream_;
  ep::Exchange exchange_;
  model::DeviceTensor hidden_;
  model::DeviceTensor ids_;
  std::vector<float> rows_;
  std::vector<int32_t> chosen_;
  model::DeviceTensor outputs_;
  model::DeviceTensor copied_;
  model::DeviceTensor encoded_;
  std::vector<Traffic> traffic_;  // per rank
  uint64_t sink_ = 0;             // or the compiler would drop the reading
  int64_t meetings_ = 0;
};

}  // namespace

model::ExchangeShape a2a_shape(const A2aBenchOptions& options, int64_t tokens) {
  return {.max_rows = tokens,
          .hidden = options.hidden,
          .top_k = options.top_k,
          .num_experts = options.num_experts,
          .formats = {options.weights}};
}

ep::ExchangeOptions a2a_exchange_options(const A2aBenchOptions& options, ep::All2All backend, int64_t ranks,
                                         int64_t tokens) {
  return {.backend = backend,
          .row_format = options.row_format,
          .max_slots = ranks * tokens * options.top_k,
          .received_rows = (ranks - 1) * tokens};
}

int64_t a2a_outputs_offset(const A2aRankOptions& options, const kernels::Ops& ops, int64_t ranks) {
  const ep::ExchangeOptions exchange = a2a_exchange_options(*options.bench, options.backend, ranks, options.tokens);
  return ep::plan_window(exchange, ops, a2a_shape(*options.bench, options.tokens), static_cast<int32_t>(ranks)).outputs;
}

Status run_a2a_rank(const A2aRankOptions& options, group::Fabric& fabric, PlainCopy& plain, A2aBoard& board,
                    A2aRecord& record) {
  return A2aRank(options, fabric, plain, board, record).run();
}

}  // namespace tandem::bench
