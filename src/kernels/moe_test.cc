// Router and experts of every backend.
#include <gmock/gmock.h>

#include <bit>

#include "src/kernels/integer.h"
#include "src/kernels/test_support.h"

namespace tandem::kernels {
namespace {

struct Routing {
  Matrix<int32_t> ids;
  Matrix<float> weights;
};

Routing route(Device& device, const Matrix<float>& logits, const Matrix<float>* bias, const RouterParams& params) {
  const Tensor ids = device.make(DType::kI32, logits.rows, params.top_k);
  const Tensor weights = device.make_f32(logits.rows, params.top_k, 1);
  device.ops().route(device.stream(), device.put(logits, 2), bias != nullptr ? device.put(*bias) : Tensor{}, params,
                     ids, weights);
  return {device.get<int32_t>(ids), device.get_f32(weights)};
}

class MoeTest : public BackendTest {};

TEST_P(MoeTest, RouterAgreesWithTheReference) {
  Random random(31);
  const RouterParams all_params[] = {
      {.scoring = RouterScoring::kSoftmax, .top_k = 8, .normalize = true},
      {.scoring = RouterScoring::kSoftmax, .top_k = 1, .normalize = false, .scale = 3.0F},
      {.scoring = RouterScoring::kSigmoid, .top_k = 6, .num_groups = 8, .top_groups = 4, .scale = 2.5F},
      {.scoring = RouterScoring::kSigmoid, .top_k = 2, .num_groups = 1, .normalize = false}};
  for (const RouterParams& params : all_params) {
    for (const int64_t experts : {8, 24, 40, 256}) {
      if (params.num_groups > 1 && experts < 16) continue;
      const Matrix<float> logits = random.matrix(40, experts);
      const Matrix<float> bias = random.matrix(1, experts, 0.1F);
      Device device(name(), 2);
      Device reference("ref");
      const Routing result = route(device, logits, &bias, params);
      const Routing expected = route(reference, logits, &bias, params);
      EXPECT_TRUE(same_bits(result.ids, expected.ids));
      EXPECT_LE(relative_error(result.weights, expected.weights), 2e-6F);
      const Routing single = route(device, logits.rows_slice(5, 1), &bias, params);
      EXPECT_TRUE(same_bits(single.weights, result.weights.rows_slice(5, 1)));
    }
  }
}

TEST_P(MoeTest, RouterTiesGoToTheLowestIndex) {
  Device device(name());
  const Matrix<float> equal(1, 20, std::vector<float>(20, 0.5F));
  const RouterParams plain{.scoring = RouterScoring::kSoftmax, .top_k = 3};
  EXPECT_THAT(route(device, equal, nullptr, plain).ids.values, testing::ElementsAre(0, 1, 2));
  const RouterParams grouped{.scoring = RouterScoring::kSigmoid, .top_k = 3, .num_groups = 4, .top_groups = 2};
  EXPECT_THAT(route(device, equal, nullptr, grouped).ids.values, testing::ElementsAre(0, 1, 2));
  Matrix<float> late = equal;
  late.row(0)[19] = 1.0F;  // its group becomes the first, its companions win over lower indices of other groups
  const RouterParams one_group{.scoring = RouterScoring::kSigmoid, .top_k = 3, .num_groups = 4, .top_groups = 1};
  EXPECT_THAT(route(device, late, nullptr, one_group).ids.values, testing::ElementsAre(19, 15, 16));
}

TEST_P(MoeTest, RouterStaysInRangeWithNaN) {
  Device device(name());
  const Matrix<float> logits(1, 8, std::vector<float>(8, std::numeric_limits<float>::quiet_NaN()));
  const Routing result = route(device, logits, nullptr, {.scoring = RouterScoring::kSigmoid, .top_k = 4});
  EXPECT_THAT(result.ids.values, testing::ElementsAre(0, 1, 2, 3));
}

// Weights of E experts, and what a step does with rows and their experts.
struct Experts {
  int64_t count;
  int64_t hidden;
  int64_t width;
  Matrix<float> gate_up;
  Matrix<float> down;

  Experts(Random& random, int64_t e, int64_t h, int64_t w)
      : count(e),
        hidden(h),
        width(w),
        gate_up(random.matrix(e * 2 * w, h, 0.3F)),
        down(random.matrix(e * h, w, 0.3F)) {}

  Matrix<float> run(Device& device, const Matrix<float>& x, const Matrix<int32_t>& ids, WeightFormat format) const {
    const std::unique_ptr<Weight> packed_gate_up = device.pack(gate_up, format, count);
    const std::unique_ptr<Weight> packed_down = device.pack(down, format, count);
    const Tensor order = device.make(DType::kI32, ids.rows * ids.cols, 1);
    const Tensor offsets = device.make(DType::kI32, count + 1, 1);
    const Tensor out = device.make_f32(ids.rows * ids.cols, hidden, 2);
    device.ops().sort_by_expert(device.stream(), device.put(ids), count, order, offsets);
    device.ops().expert_mlp(device.stream(), device.put(x, 1), order, offsets, ids.cols, *packed_gate_up, *packed_down,
                            out);
    return device.get_f32(out);
  }
};

Matrix<int32_t> random_ids(Random& random, int64_t rows, int64_t top_k, int64_t experts) {
  Matrix<int32_t> ids(rows, top_k);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(random.permutation(experts).begin(), top_k, ids.row(r));
  return ids;
}

TEST_P(MoeTest, ExpertsAgreeWithTheReference) {
  Random random(32);
  for (const WeightFormat format : {kF32Weights, kBf16Weights}) {
    for (const Experts& experts : {Experts(random, 4, 32, 16), Experts(random, 3, 33, 17), Experts(random, 5, 1, 1),
                                   Experts(random, 2, 70, 300)}) {
      for (const int64_t rows : {1, 2, 30}) {
        const Matrix<float> x = random.matrix(rows, experts.hidden);
        const Matrix<int32_t> ids = random_ids(random, rows, 2, experts.count);
        Device device(name(), 2);
        Device reference("ref");
        const float error = relative_error(experts.run(device, x, ids, format), experts.run(reference, x, ids, format));
        EXPECT_LE(error, rounds_x(format) ? 2e-2F : 5e-6F) << experts.hidden << " x " << experts.width;
      }
    }
  }
}

TEST_P(MoeTest, ASlotDoesNotDependOnItsCompanions) {
  Random random(33);
  for (const WeightFormat format : {kF32Weights, kBf16Weights}) {
    const Experts experts(random, 4, 65, 50);
    constexpr int64_t kRows = 150;  // several blocks of rows for each expert
    const Matrix<float> x = random.matrix(kRows, experts.hidden);
    const Matrix<int32_t> ids = random_ids(random, kRows, 3, experts.count);
    Device device(name(), 1);
    const Matrix<float> together = experts.run(device, x, ids, format);
    for (const int64_t row : {0, 71, 149}) {
      EXPECT_TRUE(same_bits(experts.run(device, x.rows_slice(row, 1), ids.rows_slice(row, 1), format),
                            together.rows_slice(row * 3, 3)));
    }
    const std::vector<int32_t> order = random.permutation(kRows);
    Device three(name(), 3);
    const Matrix<float> shuffled = experts.run(three, x.permuted(order), ids.permuted(order), format);
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t source = order[static_cast<size_t>(r)];
      EXPECT_TRUE(same_bits(shuffled.rows_slice(r * 3, 3), together.rows_slice(source * 3, 3))) << r;
    }
    // The same expert in another place of the row's list gives the same slot.
    Matrix<int32_t> swapped = ids.rows_slice(0, 1);
    std::swap(swapped.row(0)[0], swapped.row(0)[2]);
    const Matrix<float> result = experts.run(device, x.rows_slice(0, 1), swapped, format);
    EXPECT_TRUE(same_bits(result.rows_slice(0, 1), together.rows_slice(2, 1)));
    EXPECT_TRUE(same_bits(result.rows_slice(2, 1), together.rows_slice(0, 1)));
  }
}

TEST_P(MoeTest, SortSkipsSlotsOfNobody) {
  Device device(name());
  const Matrix<int32_t> ids(3, 2, {1, -1, 0, 1, -1, -1});
  const Tensor order = device.make(DType::kI32, 6, 1);
  const Tensor offsets = device.make(DType::kI32, 4, 1);
  device.ops().sort_by_expert(device.stream(), device.put(ids), 3, order, offsets);
  EXPECT_THAT(device.get<int32_t>(offsets).values, testing::ElementsAre(0, 1, 3, 3));
  EXPECT_THAT(device.get<int32_t>(order.row_slice(0, 3)).values, testing::ElementsAre(2, 0, 3));
}

// Gives some slots to nobody.
Matrix<int32_t> drop_slots(Random& random, Matrix<int32_t> ids) {
  for (int32_t& id : ids.values) id = random.integer(0, 2) == 0 ? id : -1;
  return ids;
}

TEST_P(MoeTest, SlotsOfNobodyAreNotTouched) {
  Random random(34);
  for (const WeightFormat format : kTestedFormats) {
    const Experts experts(random, 4, 70, 50);
    const Matrix<float> x = random.matrix(40, experts.hidden);
    const Matrix<int32_t> ids = random_ids(random, x.rows, 3, experts.count);
    const Matrix<int32_t> some = drop_slots(random, ids);
    Device device(name(), 2);
    const Matrix<float> all = experts.run(device, x, ids, format);
    const Matrix<float> result = experts.run(device, x, some, format);
    const std::vector<float> filling(static_cast<size_t>(experts.hidden), std::bit_cast<float>(0xFFFFFFFFU));
    const Matrix<float> untouched(1, experts.hidden, filling);
    for (int64_t slot = 0; slot < result.rows; ++slot) {
      const bool is_computed = some.values[static_cast<size_t>(slot)] >= 0;
      EXPECT_TRUE(same_bits(result.rows_slice(slot, 1), is_computed ? all.rows_slice(slot, 1) : untouched)) << slot;
    }
  }
}

// expert_mlp_encoded of `ids`; the output of slot s goes to row places[s] of the result.
Matrix<float> run_encoded(const Experts& experts, Device& device, const Matrix<float>& x, const Matrix<int32_t>& ids,
                          WeightFormat format, RowFormat row_format, const std::vector<int32_t>& places) {
  const std::unique_ptr<Weight> gate_up = device.pack(experts.gate_up, format, experts.count);
  const std::unique_ptr<Weight> down = device.pack(experts.down, format, experts.count);
  Ops& ops = device.ops();
  const int64_t row_bytes = ops.expert_row_bytes(row_format, format, experts.hidden);
  EXPECT_EQ(row_bytes % 64, 0);
  const EncodedRows rows{device.make(DType::kU8, x.rows, row_bytes, 36), row_format};
  ops.encode_expert_rows(device.stream(), device.put(x, 1), format, rows);
  const Tensor order = device.make(DType::kI32, ids.rows * ids.cols, 1);
  const Tensor offsets = device.make(DType::kI32, experts.count + 1, 1);
  ops.sort_by_expert(device.stream(), device.put(ids), experts.count, order, offsets);
  const Tensor out = device.make_f32(ids.rows * ids.cols, experts.hidden, 2);
  const int64_t count = device.get<int32_t>(offsets).at(experts.count, 0);
  const Matrix<int32_t> slots = device.get<int32_t>(order.row_slice(0, count));
  // From the middle of the rows, so that some targets lie before it.
  const int64_t middle = out.rows / 2 * out.stride;
  std::vector<int64_t> targets;
  for (const int32_t slot : slots.values) targets.push_back(places[static_cast<size_t>(slot)] * out.stride - middle);
  ops.expert_mlp_encoded(device.stream(), rows, order.row_slice(0, count), offsets, ids.cols, *gate_up, *down,
                         reinterpret_cast<float*>(out.address) + middle, device.put_column(targets));
  return device.get_f32(out);
}

TEST_P(MoeTest, ExactRowsLoseNothing) {
  Random random(35);
  for (const WeightFormat format : kTestedFormats) {
    for (const Experts& experts : {Experts(random, 4, 96, 50), Experts(random, 3, 33, 17), Experts(random, 2, 1, 1)}) {
      const Matrix<float> x = random.matrix(40, experts.hidden);
      const Matrix<int32_t> ids = drop_slots(random, random_ids(random, x.rows, 2, experts.count));
      const std::vector<int32_t> places = random.permutation(x.rows * 2);
      Device device(name(), 2);
      const Matrix<float> expected = experts.run(device, x, ids, format);
      const Matrix<float> result = run_encoded(experts, device, x, ids, format, RowFormat::kExact, places);
      for (int64_t slot = 0; slot < expected.rows; ++slot) {
        EXPECT_TRUE(same_bits(result.rows_slice(places[static_cast<size_t>(slot)], 1), expected.rows_slice(slot, 1)))
            << weight_format_name(format) << " slot " << slot;
      }
    }
  }
}

// What a row is behind a lossy journey, by the definitions of the formats.
Matrix<float> round_rows(const Matrix<float>& x, RowFormat format) {
  Matrix<float> rounded(x.rows, x.cols);
  for (int64_t r = 0; r < x.rows; ++r) {
    const float* row = x.row(r);
    float* out = rounded.row(r);
    std::vector<uint8_t> codes(static_cast<size_t>(x.cols));
    IntegerActivationRow integers;
    if (format == RowFormat::kInt8) encode_activation_row(row, x.cols, {WeightType::kInt8, 0, 8}, &integers);
    const float scale = format == RowFormat::kF8E4M3 ? quantize_f8e4m3(row, x.cols, codes.data()) : 0.0F;
    for (int64_t i = 0; i < x.cols; ++i) {
      const size_t at = static_cast<size_t>(i);
      if (format == RowFormat::kBf16) out[i] = float_from_bf16(bf16_from_float(row[i]));
      if (format == RowFormat::kInt8) out[i] = static_cast<float>(integers.codes[at]) * integers.scales[0];
      if (format == RowFormat::kF8E4M3) out[i] = float_from_f8e4m3(codes[at]) * scale;
    }
  }
  return rounded;
}

TEST_P(MoeTest, LossyRowsAreRoundedOnceAndNoMore) {
  Random random(36);
  for (const WeightFormat format : kTestedFormats) {
    for (const RowFormat row_format : {RowFormat::kBf16, RowFormat::kInt8, RowFormat::kF8E4M3}) {
      for (const Experts& experts : {Experts(random, 4, 96, 50), Experts(random, 3, 33, 17)}) {
        const Matrix<float> x = random.matrix(20, experts.hidden);
        const Matrix<int32_t> ids = random_ids(random, x.rows, 2, experts.count);
        std::vector<int32_t> places(static_cast<size_t>(x.rows * 2));
        std::iota(places.begin(), places.end(), 0);
        Device device(name(), 2);
        EXPECT_TRUE(same_bits(run_encoded(experts, device, x, ids, format, row_format, places),
                              experts.run(device, round_rows(x, row_format), ids, format)))
            << weight_format_name(format) << " rows as " << row_format_name(row_format);
      }
    }
  }
}

TANDEM_FOR_ALL_BACKENDS(MoeTest);

}  // namespace
}  // namespace tandem::kernels
