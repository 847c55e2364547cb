// Matrix products of every backend: against the reference, and exact whatever shares the call.
#include "src/kernels/test_support.h"

namespace tandem::kernels {
namespace {

struct Shape {
  int64_t rows, n, k;
};

// Edges of tiles (5, 6, 8 rows), of many rows (24, 45), of panels (16) and groups of them, of passes over k (256, 512),
// odd k.
constexpr Shape kShapes[] = {{1, 1, 1},      {1, 16, 2},   {2, 17, 3},     {3, 15, 31},   {4, 100, 64},  {5, 33, 257},
                             {6, 64, 128},   {7, 50, 300}, {8, 16, 33},    {15, 70, 20},  {16, 31, 511}, {19, 48, 256},
                             {25, 130, 513}, {97, 40, 90}, {46, 35, 1025}, {200, 36, 70}, {1, 700, 640}, {2, 300, 777}};

class LinearTest : public BackendTest {
 protected:
  Matrix<float> multiply(const Matrix<float>& x, const Matrix<float>& w, WeightFormat format, int threads = 1) {
    return multiply_on(name(), x, w, format, threads);
  }
  static Matrix<float> multiply_on(const std::string& backend, const Matrix<float>& x, const Matrix<float>& w,
                                   WeightFormat format, int threads) {
    Device device(backend, threads);
    const std::unique_ptr<Weight> weight = device.pack(w, format);
    const Tensor out = device.make_f32(x.rows, w.rows, 3);
    device.ops().linear(device.stream(), device.put(x, 5), *weight, out);
    return device.get_f32(out);
  }
};

TEST_P(LinearTest, AgreesWithTheReference) {
  Random random(1);
  for (const WeightFormat format : {kF32Weights, kBf16Weights}) {
    const float tolerance = rounds_x(format) ? 1e-2F : 5e-6F;
    for (const Shape& shape : kShapes) {
      const Matrix<float> x = random.matrix(shape.rows, shape.k);
      const Matrix<float> w = random.matrix(shape.n, shape.k);
      const float error = relative_error(multiply(x, w, format), multiply_on("ref", x, w, format, 1));
      EXPECT_LE(error, tolerance) << shape.rows << " x " << shape.n << " x " << shape.k;
    }
  }
}

TEST_P(LinearTest, ARowDoesNotDependOnItsCompanions) {
  Random random(2);
  for (const WeightFormat format : kTestedFormats) {
    for (const Shape& shape : {Shape{64, 83, 1101}, Shape{200, 36, 70}, Shape{11, 500, 515}}) {
      const Matrix<float> x = random.matrix(shape.rows, shape.k);
      const Matrix<float> w = random.matrix(shape.n, shape.k);
      const Matrix<float> together = multiply(x, w, format);
      for (const int64_t count : {1, 2, 3, 5, 6, 9, 16, 24, 25, 45, 46, 60}) {
        const int64_t first = random.integer(0, std::max(int64_t{0}, shape.rows - count));
        const int64_t rows = std::min(count, shape.rows - first);
        EXPECT_TRUE(same_bits(multiply(x.rows_slice(first, rows), w, format), together.rows_slice(first, rows)))
            << rows << " of " << shape.rows << " rows, n " << shape.n << ", k " << shape.k;
      }
      const std::vector<int32_t> order = random.permutation(shape.rows);
      EXPECT_TRUE(same_bits(multiply(x.permuted(order), w, format), together.permuted(order)));
    }
  }
}

TEST_P(LinearTest, AnOutputDoesNotDependOnTheOthers) {
  Random random(3);
  for (const WeightFormat format : kTestedFormats) {
    const Matrix<float> x = random.matrix(20, 77);
    const Matrix<float> w = random.matrix(90, 77);
    const Matrix<float> all = multiply(x, w, format);
    for (const int64_t n : {1, 15, 16, 31, 64, 89}) {
      const Matrix<float> some = multiply(x, w.rows_slice(90 - n, n), format);
      for (int64_t r = 0; r < x.rows; ++r) {
        EXPECT_EQ(std::memcmp(some.row(r), all.row(r) + 90 - n, static_cast<size_t>(n) * sizeof(float)), 0) << n;
      }
    }
  }
}

TEST_P(LinearTest, ThreadsDoNotChangeTheResult) {
  Random random(4);
  for (const Shape& shape : {Shape{1, 900, 400}, Shape{130, 200, 200}}) {
    const Matrix<float> x = random.matrix(shape.rows, shape.k);
    const Matrix<float> w = random.matrix(shape.n, shape.k);
    const Matrix<float> alone = multiply(x, w, kBf16Weights, 1);
    EXPECT_TRUE(same_bits(multiply(x, w, kBf16Weights, 2), alone));
    EXPECT_TRUE(same_bits(multiply(x, w, kBf16Weights, 3), alone));
  }
}

TEST_P(LinearTest, OtherRowsNaNsStayThere) {
  Random random(5);
  Matrix<float> x = random.matrix(30, 50);
  const Matrix<float> w = random.matrix(40, 50);
  const Matrix<float> clean = multiply(x, w, kBf16Weights);
  std::fill_n(x.row(7), 50, std::numeric_limits<float>::quiet_NaN());
  const Matrix<float> dirty = multiply(x, w, kBf16Weights);
  EXPECT_TRUE(std::isnan(dirty.at(7, 0)));
  EXPECT_TRUE(same_bits(dirty.rows_slice(0, 7), clean.rows_slice(0, 7)));
  EXPECT_TRUE(same_bits(dirty.rows_slice(8, 22), clean.rows_slice(8, 22)));
}

TEST_P(LinearTest, HeadLinearAgreesWithLinear) {
  Random random(6);
  constexpr int64_t kHeads = 3;
  for (const Shape& shape : {Shape{1, 40, 33}, Shape{30, 17, 64}}) {
    for (const WeightFormat format : kTestedFormats) {
      Device device(name(), 2);
      const int64_t x_stride = shape.k + 4;
      const int64_t out_stride = shape.n + 1;
      const Matrix<float> x = random.matrix(shape.rows, kHeads * x_stride);
      const Matrix<float> w = random.matrix(kHeads * shape.n, shape.k);
      const Tensor x_tensor = device.put(x, 2);
      const Tensor out = device.make_f32(shape.rows, kHeads * out_stride);
      const std::unique_ptr<Weight> weight = device.pack(w, format, kHeads);
      device.ops().head_linear(device.stream(), x_tensor, x_stride, *weight, out, out_stride);
      for (int64_t h = 0; h < kHeads; ++h) {
        const std::unique_ptr<Weight> one = device.pack(w.rows_slice(h * shape.n, shape.n), format);
        const Tensor expected = device.make_f32(shape.rows, shape.n);
        device.ops().linear(device.stream(), x_tensor.col_slice(h * x_stride, shape.k), *one, expected);
        EXPECT_TRUE(same_bits(device.get_f32(out.col_slice(h * out_stride, shape.n)), device.get_f32(expected)));
      }
    }
  }
}

// Of the same formats, of different ones, and where there is too little to do for several threads.
TEST_P(LinearTest, SeveralWeightsAtOnceGiveTheBitsOfOneByOne) {
  Random random(9);
  for (const Shape& shape : {Shape{1, 300, 257}, Shape{7, 33, 64}, Shape{110, 40, 70}}) {
    const Matrix<float> x = random.matrix(shape.rows, shape.k);
    for (size_t f = 0; f < std::size(kTestedFormats); ++f) {
      const WeightFormat other = kTestedFormats[(f + 1) % std::size(kTestedFormats)];
      for (const WeightFormat last : {kTestedFormats[f], other}) {
        Device device(name(), 3);
        std::vector<std::unique_ptr<Weight>> weights;
        std::vector<const Weight*> pointers;
        std::vector<Tensor> outs;
        for (const int64_t n : {shape.n, int64_t{17}, shape.n + 9}) {
          weights.push_back(device.pack(random.matrix(n, shape.k), outs.size() == 2 ? last : kTestedFormats[f]));
          pointers.push_back(weights.back().get());
          outs.push_back(device.make_f32(shape.rows, n, 3));
        }
        const Tensor input = device.put(x, 5);
        device.ops().linears(device.stream(), input, pointers, outs);
        for (size_t i = 0; i < outs.size(); ++i) {
          const Tensor expected = device.make_f32(shape.rows, outs[i].cols);
          device.ops().linear(device.stream(), input, *weights[i], expected);
          EXPECT_TRUE(same_bits(device.get_f32(outs[i]), device.get_f32(expected)))
              << weight_format_name(kTestedFormats[f]) << " and " << weight_format_name(last);
        }
      }
    }
  }
}

TEST_P(LinearTest, EmbedReturnsTheRowsOfTheTable) {
  Random random(7);
  Device device(name(), 2);
  const Matrix<float> table = random.matrix(37, 21);
  for (const WeightFormat format : {kF32Weights, kBf16Weights}) {
    const std::unique_ptr<Weight> weight = device.pack(table, format);
    const std::vector<int32_t> ids{0, 36, 16, 15, 16};
    const Tensor out = device.make_f32(5, 21, 1);
    device.ops().embed(device.stream(), *weight, device.put_column(ids), out);
    Matrix<float> expected = table.permuted(ids);
    if (format == kBf16Weights) {
      for (float& value : expected.values) value = float_from_bf16(bf16_from_float(value));
    }
    EXPECT_TRUE(same_bits(device.get_f32(out), expected));
  }
}

TEST_P(LinearTest, Fp8WeightsAreCodesTimesScales) {
  Random random(8);
  constexpr int64_t kN = 40;
  constexpr int64_t kK = 70;
  std::vector<uint8_t> codes(kN * kK);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i % 127);  // no NaN
  const Matrix<float> scales = random.matrix(3, 5);
  const HostMatrix matrix{.data = reinterpret_cast<const std::byte*>(codes.data()),
                          .dtype = DType::kF8E4M3,
                          .n = kN,
                          .k = kK,
                          .scales = reinterpret_cast<const std::byte*>(scales.values.data()),
                          .block_n = 16,
                          .block_k = 16};
  Matrix<float> dense(kN, kK);
  for (int64_t n = 0; n < kN; ++n) {
    for (int64_t k = 0; k < kK; ++k) {
      dense.row(n)[k] = float_from_f8e4m3(codes[static_cast<size_t>(n * kK + k)]) * scales.at(n / 16, k / 16);
    }
  }
  Device device(name());
  const Tensor x = device.put(random.matrix(4, kK));
  for (const WeightFormat format : {kF32Weights, kBf16Weights}) {
    const std::unique_ptr<Weight> packed = device.ops().pack_weight(std::span(&matrix, 1), format);
    const std::unique_ptr<Weight> expected = device.pack(dense, format);
    const Tensor out = device.make_f32(4, kN);
    const Tensor expected_out = device.make_f32(4, kN);
    device.ops().linear(device.stream(), x, *packed, out);
    device.ops().linear(device.stream(), x, *expected, expected_out);
    EXPECT_TRUE(same_bits(device.get_f32(out), device.get_f32(expected_out)));
    EXPECT_EQ(packed->format(), format);
    EXPECT_EQ(packed->n(), kN);
    EXPECT_EQ(packed->k(), kK);
  }
}

TANDEM_FOR_ALL_BACKENDS(LinearTest);

}  // namespace
}  // namespace tandem::kernels
