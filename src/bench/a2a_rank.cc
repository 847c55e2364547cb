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
  A2aRank(const A2aRankOptions& options, group::Fabric& fabric, A2aBoard& board, A2aRecord& record)
      : bench_(*options.bench),
        tokens_(options.tokens),
        fabric_(fabric),
        board_(board),
        record_(record),
        ops_(kernels::make_ops("auto", 1).value()),
        stream_(ops_->make_stream()),
        exchange_(ep::make_shard(fabric.rank().value, fabric.size(), static_cast<int32_t>(bench_.num_experts)),
                  a2a_exchange_options(bench_, options.backend, fabric.size(), tokens_)),
        hidden_(*ops_, DType::kF32, tokens_, bench_.hidden),
        ids_(*ops_, DType::kI32, tokens_, bench_.top_k),
        rows_to_(static_cast<size_t>(fabric.size())),
        outputs_to_(rows_to_.size()) {
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
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kLooksBeforeYield = 20'000;  // well below a millisecond

  void make_rows() {
    std::mt19937_64 random(bench_.seed * 1000 + static_cast<uint64_t>(fabric_.rank().value));
    std::normal_distribution<float> normal;
    rows_.resize(static_cast<size_t>(tokens_ * bench_.hidden));
    for (float& value : rows_) value = normal(random);
    std::vector<int32_t> experts(static_cast<size_t>(bench_.num_experts));
    std::iota(experts.begin(), experts.end(), 0);
    for (int64_t t = 0; t < tokens_; ++t) {
      std::shuffle(experts.begin(), experts.end(), random);
      chosen_.insert(chosen_.end(), experts.begin(), experts.begin() + bench_.top_k);
      count_destinations(std::span(experts).first(static_cast<size_t>(bench_.top_k)));
    }
    ops_->upload(*stream_, ids_.all().address, std::as_bytes(std::span(chosen_)));
    ops_->synchronize(*stream_);
  }

  // As the norm before the experts would, a moment before.
  void write_hidden() {
    ops_->upload(*stream_, hidden_.all().address, std::as_bytes(std::span(rows_)));
    ops_->synchronize(*stream_);
  }

  void count_destinations(std::span<const int32_t> experts) {
    const ep::All2All backend = exchange_.plan().backend;
    const bool sends_all = backend == ep::All2All::kAllGather || backend == ep::All2All::kNaive;
    const ep::ExpertMap map = ep::ExpertMap::contiguous(fabric_.size(), static_cast<int32_t>(bench_.num_experts));
    std::vector<int64_t> is_destination(rows_to_.size(), sends_all ? 1 : 0);
    for (const int32_t e : experts) is_destination[static_cast<size_t>(map.slot_of(e, 0) / map.slots_per_rank())] = 1;
    is_destination[static_cast<size_t>(rank())] = 0;
    for (size_t r = 0; r < rows_to_.size(); ++r) rows_to_[r] += is_destination[r];
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
    std::fill(outputs_to_.begin(), outputs_to_.end(), 0);
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
    copy_plainly(round);
    return {};
  }

  bool has_turns() const { return exchange_.plan().backend == ep::All2All::kNaive; }

  // Stands for the experts: reads the rows; each output begins with the number of its expert. Own outputs would be
  // written where they belong; here that is done once, to be checked.
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
        if (round == -kA2aWarmups && owner_of(received, place) == rank()) copy_output(received, place);
      }
    }
  }

  void place_outputs(const model::ReceivedSlots& received) {
    for (int64_t place = 0; place < received.count; ++place) {
      const int32_t owner = owner_of(received, place);
      if (owner == rank()) continue;
      copy_output(received, place);
      outputs_to_[static_cast<size_t>(owner)] += output_bytes();
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
  void copy_plainly(int64_t round) {
    const ep::WindowPlan& plan = exchange_.plan();
    record_.dispatch_bytes = std::accumulate(rows_to_.begin(), rows_to_.end(), int64_t{0}) * plan.record_bytes;
    record_.combine_bytes = std::accumulate(outputs_to_.begin(), outputs_to_.end(), int64_t{0});
    const int64_t most = std::max(record_.dispatch_bytes, record_.combine_bytes);
    if (copied_.bytes() < most) copied_ = model::DeviceTensor(*ops_, DType::kU8, most, 1);
    std::vector<int64_t> bytes_to = rows_to_;
    for (int64_t& bytes : bytes_to) bytes *= plan.record_bytes;
    std::memset(copied_.all().address, static_cast<int>(round), static_cast<size_t>(record_.dispatch_bytes));
    note(round, kA2aCopyDispatch, copy_to_peers(bytes_to));
    note(round, kA2aCopyCombine, copy_to_peers(outputs_to_));
  }

  // Into the outputs of the peers, each sender into a part of its own.
  double copy_to_peers(const std::vector<int64_t>& bytes_to) {
    const ep::WindowPlan& plan = exchange_.plan();
    const int64_t room = plan.bytes - plan.outputs;
    meet();
    const Time::time_point begin = Time::now();
    size_t from = 0;
    for (int32_t i = 1; i < fabric_.size(); ++i) {
      const int32_t to = (rank() + i) % fabric_.size();
      const int64_t bytes = bytes_to[static_cast<size_t>(to)];
      CHECK_LE(bytes, room);
      const int64_t place = room / (fabric_.size() - 1) * (rank() < to ? rank() : rank() - 1) / kLine * kLine;
      std::memcpy(fabric_.direct(RankId(to)) + plan.outputs + std::min(place, room - bytes), copied_.all().address + from,
                  static_cast<size_t>(bytes));
      from += static_cast<size_t>(bytes);
    }
    const double us = us_since(begin);
    meet();
    read(fabric_.window().data() + plan.outputs, room);
    return us;
  }

  void read(const std::byte* memory, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += kLine) sink_ += static_cast<uint64_t>(memory[at]);
  }

  // Whose window a place's target lies in.
  int32_t owner_of(const model::ReceivedSlots& received, int64_t place) {
    const std::byte* const target = reinterpret_cast<const std::byte*>(
        received.out + reinterpret_cast<const int64_t*>(received.targets.address)[place]);
    for (int32_t r = 0; r < fabric_.size(); ++r) {
      const std::byte* const window = fabric_.direct(RankId(r));
      if (target >= window && target < window + std::ssize(fabric_.window())) return r;
    }
    CHECK(false);
    return -1;
  }

  int32_t rank() const { return fabric_.rank().value; }
  int64_t output_bytes() const { return bench_.hidden * int64_t{sizeof(float)}; }

  const A2aBenchOptions& bench_;
  const int64_t tokens_;
  group::Fabric& fabric_;
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
  std::vector<int64_t> rows_to_;     // per rank: rows that dispatch sends
  std::vector<int64_t> outputs_to_;  // per rank: bytes of outputs
  uint64_t sink_ = 0;                // or the compiler would drop the reading
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

Status run_a2a_rank(const A2aRankOptions& options, group::Fabric& fabric, A2aBoard& board, A2aRecord& record) {
  return A2aRank(options, fabric, board, record).run();
}

}  // namespace tandem::bench
