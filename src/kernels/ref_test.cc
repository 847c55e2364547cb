// The oracle itself, against cases small enough to work out by hand.
#include <gmock/gmock.h>

#include <cmath>

#include "src/kernels/test_support.h"

namespace tandem::kernels {
namespace {

using testing::ElementsAre;
using testing::FloatEq;
using testing::FloatNear;

class RefTest : public testing::Test {
 protected:
  Device device_{"ref"};
  Ops& ops_ = device_.ops();
  Stream& stream_ = device_.stream();
};

TEST_F(RefTest, LinearMultipliesByTheTranspose) {
  const std::unique_ptr<Weight> weight = device_.pack(Matrix<float>(2, 3, {1, 2, 3, 4, 5, 6}), kF32Weights);
  const Tensor out = device_.make_f32(2, 2);
  ops_.linear(stream_, device_.put(Matrix<float>(2, 3, {1, 0, 2, 0, 1, 0})), *weight, out);
  EXPECT_THAT(device_.get_f32(out).values, ElementsAre(7, 16, 2, 5));
}

TEST_F(RefTest, Bf16WeightsAreRounded) {
  const float fine = 1.0F + 1.0F / 1024;  // not a bf16
  const std::unique_ptr<Weight> weight = device_.pack(Matrix<float>(1, 1, {fine}), kBf16Weights);
  const Tensor out = device_.make_f32(1, 1);
  ops_.linear(stream_, device_.put(Matrix<float>(1, 1, {1})), *weight, out);
  EXPECT_THAT(device_.get_f32(out).values, ElementsAre(1));
}

TEST_F(RefTest, HeadLinearUsesEachHeadsOwnMatrix) {
  const std::unique_ptr<Weight> weight = device_.pack(Matrix<float>(2, 2, {1, 1, 2, 3}), kF32Weights, 2);
  const Tensor out = device_.make_f32(1, 3);
  ops_.head_linear(stream_, device_.put(Matrix<float>(1, 5, {1, 2, 9, 3, 4})), 3, *weight, out, 2);
  const Matrix<float> result = device_.get_f32(out);
  EXPECT_EQ(result.at(0, 0), 3.0F);
  EXPECT_EQ(result.at(0, 2), 18.0F);
  EXPECT_TRUE(std::isnan(result.at(0, 1)));  // between the heads nothing is written
}

TEST_F(RefTest, NormsRunPerSegment) {
  const Tensor x = device_.put(Matrix<float>(1, 4, {3, 4, 1, 1}));
  const Tensor out = device_.make_f32(1, 4);
  ops_.rms_norm(stream_, x, device_.put(Matrix<float>(1, 2, {1, 2})), 0.0F, out);
  const float root = std::sqrt(12.5F);
  EXPECT_THAT(device_.get_f32(out).values, ElementsAre(FloatEq(3 / root), FloatEq(8 / root), FloatEq(1), FloatEq(2)));

  const Tensor residual = device_.put(Matrix<float>(1, 2, {1, 1}));
  const Tensor sum_out = device_.make_f32(1, 2);
  ops_.add_rms_norm(stream_, residual, device_.put(Matrix<float>(1, 2, {2, 3})),
                    device_.put(Matrix<float>(1, 2, {1, 2})), 0.0F, sum_out);
  EXPECT_THAT(device_.get_f32(residual).values, ElementsAre(3, 4));
  EXPECT_THAT(device_.get_f32(sum_out).values, ElementsAre(FloatEq(3 / root), FloatEq(8 / root)));
}

TEST_F(RefTest, RopeRotatesBothPairings) {
  // One frequency pair per column pair: angles 90 and 180 degrees at position 1.
  const Tensor table = device_.put(Matrix<float>(2, 4, {1, 1, 0, 0, 0, -1, 1, 0}));
  const Tensor positions = device_.put_column<int32_t>({1});
  const Tensor halves = device_.put(Matrix<float>(1, 4, {1, 2, 3, 4}));
  ops_.rope(stream_, halves, 1, 4, 4, positions, table, false);
  EXPECT_THAT(device_.get_f32(halves).values, ElementsAre(-3, -2, 1, -4));
  const Tensor pairs = device_.put(Matrix<float>(1, 4, {1, 2, 3, 4}));
  ops_.rope(stream_, pairs, 1, 4, 4, positions, table, true);
  EXPECT_THAT(device_.get_f32(pairs).values, ElementsAre(-2, 1, -3, -4));
}

TEST_F(RefTest, AttentionIsCausal) {
  // Two positions with one head of one dimension; keys 0 make the weights equal, so outputs are running means.
  const std::unique_ptr<Buffer> memory = ops_.allocate(2 * 2 * 2 * int64_t{sizeof(float)});
  const KvLayerView cache{memory->address(), 2 * 2 * int64_t{sizeof(float)}, 2, 2, DType::kF32};
  ops_.write_kv(stream_, device_.put(Matrix<float>(2, 1, {0, 0})), device_.put(Matrix<float>(2, 1, {2, 6})), 1,
                device_.put_column<int64_t>({2, 3}), cache);  // both in block 1
  const Tensor out = device_.make_f32(2, 1);
  const std::vector<SequenceRows> sequences{{.num_rows = 2, .num_blocks = 1}};
  ops_.attention(stream_, device_.put(Matrix<float>(2, 1, {5, 7})), 1, 1, 1.0F, sequences,
                 device_.put_column<int32_t>({1}), cache, out);
  EXPECT_THAT(device_.get_f32(out).values, ElementsAre(FloatEq(2), FloatEq(4)));
}

TEST_F(RefTest, RouterBreaksTiesByIndexAndNormalizes) {
  const RouterParams params{.scoring = RouterScoring::kSigmoid, .top_k = 2, .normalize = true, .scale = 2.0F};
  const Tensor ids = device_.make(DType::kI32, 1, 2);
  const Tensor weights = device_.make_f32(1, 2);
  ops_.route(stream_, device_.put(Matrix<float>(1, 4, {0, 1, 1, 1})), Tensor{}, params, ids, weights);
  EXPECT_THAT(device_.get<int32_t>(ids).values, ElementsAre(1, 2));
  EXPECT_THAT(device_.get_f32(weights).values, ElementsAre(FloatEq(1), FloatEq(1)));
}

TEST_F(RefTest, RouterBiasChoosesButDoesNotWeigh) {
  const RouterParams params{.scoring = RouterScoring::kSigmoid, .top_k = 1, .normalize = false};
  const Tensor ids = device_.make(DType::kI32, 1, 1);
  const Tensor weights = device_.make_f32(1, 1);
  ops_.route(stream_, device_.put(Matrix<float>(1, 3, {0, 3, 0})), device_.put(Matrix<float>(1, 3, {0, 0, 1})), params,
             ids, weights);
  EXPECT_THAT(device_.get<int32_t>(ids).values, ElementsAre(2));
  EXPECT_THAT(device_.get_f32(weights).values, ElementsAre(FloatEq(0.5F)));
}

TEST_F(RefTest, RouterKeepsOnlyTheBestGroups) {
  // Groups {0,1}, {2,3}, {4,5}: sums of sigmoids favour the second although the single best expert is in the third.
  const RouterParams params{.scoring = RouterScoring::kSigmoid, .top_k = 2, .num_groups = 3, .top_groups = 1};
  const Tensor ids = device_.make(DType::kI32, 1, 2);
  const Tensor weights = device_.make_f32(1, 2);
  ops_.route(stream_, device_.put(Matrix<float>(1, 6, {0, 0, 2, 1, 3, -9})), Tensor{}, params, ids, weights);
  EXPECT_THAT(device_.get<int32_t>(ids).values, ElementsAre(2, 3));
}

TEST_F(RefTest, SoftmaxRouterWithoutNormalization) {
  const RouterParams params{.scoring = RouterScoring::kSoftmax, .top_k = 1, .normalize = false};
  const Tensor ids = device_.make(DType::kI32, 1, 1);
  const Tensor weights = device_.make_f32(1, 1);
  ops_.route(stream_, device_.put(Matrix<float>(1, 2, {0, std::log(3.0F)})), Tensor{}, params, ids, weights);
  EXPECT_THAT(device_.get<int32_t>(ids).values, ElementsAre(1));
  EXPECT_THAT(device_.get_f32(weights).values, ElementsAre(FloatEq(0.75F)));
}

TEST_F(RefTest, SlotsAreSortedStably) {
  const Tensor ids = device_.put(Matrix<int32_t>(3, 2, {2, 0, 0, 2, 2, 0}));
  const Tensor order = device_.make(DType::kI32, 6, 1);
  const Tensor offsets = device_.make(DType::kI32, 4, 1);
  ops_.sort_by_expert(stream_, ids, 3, order, offsets);
  EXPECT_THAT(device_.get<int32_t>(order).values, ElementsAre(1, 2, 5, 0, 3, 4));
  EXPECT_THAT(device_.get<int32_t>(offsets).values, ElementsAre(0, 3, 3, 6));
}

TEST_F(RefTest, ExpertsGateAndCombine) {
  // Expert 0: gate x, up 1·x, down 1; expert 1: the same with down 10. H = I = 1.
  const std::unique_ptr<Weight> gate_up = device_.pack(Matrix<float>(4, 1, {1, 1, 1, 1}), kF32Weights, 2);
  const std::unique_ptr<Weight> down = device_.pack(Matrix<float>(2, 1, {1, 10}), kF32Weights, 2);
  const Tensor out = device_.make_f32(2, 1);
  ops_.expert_mlp(stream_, device_.put(Matrix<float>(1, 1, {1})), device_.put_column<int32_t>({1, 0}),
                  device_.put_column<int32_t>({0, 1, 2}), 2, *gate_up, *down, out);
  const float silu = 1.0F / (1.0F + std::exp(-1.0F));
  EXPECT_THAT(device_.get_f32(out).values, ElementsAre(FloatEq(10 * silu), FloatEq(silu)));
  const Tensor sum = device_.make_f32(1, 1);
  ops_.combine(stream_, out, device_.put(Matrix<float>(1, 2, {0.25F, 0.5F})), sum);
  EXPECT_THAT(device_.get_f32(sum).values, ElementsAre(FloatNear(3 * silu, 1e-6F)));
}

}  // namespace
}  // namespace tandem::kernels
