// A model's experts on one rank and on many, for tests of the exchange.
#pragma once

#include <chrono>
#include <random>
#include <thread>

#include "src/ep/exchange.h"
#include "src/group/test_support.h"
#include "src/kernels/test_support.h"

namespace tandem::ep {

using kernels::Device;
using kernels::Matrix;
using kernels::RowFormat;
using kernels::Tensor;
using kernels::Weight;
using kernels::WeightFormat;

// The routed experts of some layers, in host memory.
struct TestExperts {
  int64_t num_layers = 2;
  int32_t num_experts = 6;
  int64_t hidden = 48;
  int64_t width = 20;
  int64_t top_k = 3;
  WeightFormat format = kernels::kBf16Weights;
  std::vector<Matrix<float>> gate_up;  // per layer, [E * 2 width, hidden]
  std::vector<Matrix<float>> down;     // per layer, [E * hidden, width]

  void fill(kernels::Random& random) {
    for (int64_t l = 0; l < num_layers; ++l) {
      gate_up.push_back(random.matrix(num_experts * 2 * width, hidden, 0.3F));
      down.push_back(random.matrix(num_experts * hidden, width, 0.3F));
    }
  }
  // The rows of the matrices of some experts, one expert behind the other.
  static Matrix<float> pick(const Matrix<float>& all, std::span<const int32_t> experts, int64_t rows_each) {
    Matrix<float> picked(0, all.cols);
    for (const int32_t e : experts) {
      const Matrix<float> one = all.rows_slice(e * rows_each, rows_each);
      picked.values.insert(picked.values.end(), one.values.begin(), one.values.end());
      picked.rows += rows_each;
    }
    return picked;
  }
};

struct PackedExperts {
  std::vector<std::unique_ptr<Weight>> gate_up;
  std::vector<std::unique_ptr<Weight>> down;

  PackedExperts(Device& device, const TestExperts& experts, std::span<const int32_t> which) {
    for (size_t l = 0; l < static_cast<size_t>(experts.num_layers); ++l) {
      const int64_t count = std::ssize(which);
      gate_up.push_back(device.pack(TestExperts::pick(experts.gate_up[l], which, 2 * experts.width), experts.format,
                                    count));
      down.push_back(device.pack(TestExperts::pick(experts.down[l], which, experts.hidden), experts.format, count));
    }
  }
};

// What one rank brings to one exchange.
struct RankInput {
  Matrix<float> x;
  Matrix<int32_t> ids;
};

enum class Routing { kRandom, kFirstExperts, kLastExperts };

inline RankInput make_input(kernels::Random& random, const TestExperts& experts, int64_t rows, Routing routing) {
  RankInput input{random.matrix(rows, experts.hidden), Matrix<int32_t>(rows, experts.top_k)};
  for (int64_t t = 0; t < rows; ++t) {
    std::vector<int32_t> chosen = random.permutation(experts.num_experts);
    if (routing != Routing::kRandom) std::sort(chosen.begin(), chosen.end());
    if (routing == Routing::kLastExperts) std::reverse(chosen.begin(), chosen.end());
    std::copy_n(chosen.begin(), experts.top_k, input.ids.row(t));
  }
  return input;
}

// All experts on one rank: the slots [T * k, hidden].
inline Matrix<float> run_alone(Device& device, const TestExperts& experts, const PackedExperts& packed, size_t layer,
                               const RankInput& input, RowFormat row_format) {
  const int64_t slots = input.ids.rows * input.ids.cols;
  if (slots == 0) return Matrix<float>(0, experts.hidden);
  const Tensor order = device.make(kernels::DType::kI32, slots, 1);
  const Tensor offsets = device.make(kernels::DType::kI32, experts.num_experts + 1, 1);
  const Tensor out = device.make_f32(slots, experts.hidden);
  kernels::Ops& ops = device.ops();
  ops.sort_by_expert(device.stream(), device.put(input.ids), experts.num_experts, order, offsets);
  const Tensor x = device.put(input.x);
  if (row_format == RowFormat::kExact) {
    ops.expert_mlp(device.stream(), x, order, offsets, experts.top_k, *packed.gate_up[layer], *packed.down[layer], out);
    return device.get_f32(out);
  }
  const int64_t row_bytes = ops.expert_row_bytes(row_format, experts.format, experts.hidden);
  const kernels::EncodedRows rows{device.make(kernels::DType::kU8, x.rows, row_bytes), row_format};
  ops.encode_expert_rows(device.stream(), x, experts.format, rows);
  std::vector<int64_t> targets;
  for (const int32_t slot : device.get<int32_t>(order).values) targets.push_back(slot * experts.hidden);
  ops.expert_mlp_encoded(device.stream(), rows, order, offsets, experts.top_k, *packed.gate_up[layer],
                         *packed.down[layer], reinterpret_cast<float*>(out.address), device.put_column(targets));
  return device.get_f32(out);
}

// One rank: its device, its experts, its exchange.
class TestRank {
 public:
  TestRank(const std::string& backend, const TestExperts& experts, model::ExpertShard shard,
           const ExchangeOptions& options, int64_t max_rows)
      : experts_(experts), device_(backend, 1), packed_(device_, experts, shard.slots), exchange_(shard, options) {
    exchange_.prepare(device_.ops(), device_.stream(), shape(experts, max_rows));
  }

  static model::ExchangeShape shape(const TestExperts& experts, int64_t max_rows) {
    return {.max_rows = max_rows,
            .hidden = experts.hidden,
            .top_k = experts.top_k,
            .num_experts = experts.num_experts,
            .formats = std::vector<WeightFormat>(static_cast<size_t>(experts.num_layers), experts.format)};
  }

  Exchange& exchange() { return exchange_; }
  Device& device() { return device_; }
  // Sleeps now and then, so that ranks meet in all orders.
  void set_delays(uint64_t seed) { delays_.emplace(seed); }
  // Most slots that came at once.
  int64_t most_slots() const { return most_slots_; }

  Result<Matrix<float>> run(size_t layer, const RankInput& input) {
    TANDEM_TRY(send(0, layer, input));
    TANDEM_TRY(compute(0, layer));
    return finish(0);
  }
  // The parts of run(), for one of several lanes.
  Status send(int lane, size_t layer, const RankInput& input) {
    const Tensor x = device_.put(input.x);
    const Tensor ids = device_.put(input.ids);
    delay();
    return exchange_.lane(lane).dispatch(static_cast<int64_t>(layer), x, ids);
  }
  Status compute(int lane, size_t layer) {
    Exchange& exchange = exchange_.lane(lane);
    while (true) {
      delay();
      TANDEM_ASSIGN(const model::ReceivedSlots received, exchange.receive());
      if (received.count == 0) return {};
      most_slots_ = std::max(most_slots_, received.count);
      device_.ops().expert_mlp_encoded(device_.stream(), received.rows, received.order, received.offsets,
                                       experts_.top_k, *packed_.gate_up[layer], *packed_.down[layer], received.out,
                                       received.targets);
      delay();
      TANDEM_TRY(exchange.give_back());
    }
  }
  Result<Matrix<float>> finish(int lane) {
    delay();
    TANDEM_ASSIGN(const Tensor out, exchange_.lane(lane).collect());
    return device_.get_f32(out);
  }

 private:
  void delay() {
    if (!delays_) return;
    const uint64_t choice = (*delays_)() % 16;
    if (choice < 3) std::this_thread::sleep_for(std::chrono::microseconds(100 * choice));
    if (choice == 3) std::this_thread::yield();
  }

  const TestExperts& experts_;
  Device device_;
  PackedExperts packed_;
  Exchange exchange_;
  std::optional<std::mt19937_64> delays_;
  int64_t most_slots_ = 0;
};

}  // namespace tandem::ep
