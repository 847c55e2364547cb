// Operations on single rows: against the reference, and exact whatever shares the call.
#include <functional>

#include "src/kernels/test_support.h"

namespace tandem::kernels {
namespace {

constexpr float kTolerance = 3e-6F;  // of the largest output
constexpr int64_t kWidths[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 129, 300};

// Runs one operation on [rows, cols] inputs and returns its output.
using Operation = std::function<Matrix<float>(Device&, const Matrix<float>&)>;

class RowsTest : public BackendTest {
 protected:
  // Agreement with the reference, and the same bits for slices, permutations and thread counts.
  void check(uint64_t seed, int64_t width_multiple, const Operation& run) {
    Random random(seed);
    for (const int64_t width : kWidths) {
      const Matrix<float> x = random.matrix(37, width * width_multiple, 3.0F);
      Device device(name());
      Device reference("ref");
      const Matrix<float> result = run(device, x);
      EXPECT_LE(relative_error(result, run(reference, x)), kTolerance) << "width " << width;
      EXPECT_TRUE(same_bits(run(device, x.rows_slice(11, 1)), result.rows_slice(11, 1))) << "width " << width;
      const std::vector<int32_t> order = random.permutation(x.rows);
      EXPECT_TRUE(same_bits(run(device, x.permuted(order)), result.permuted(order))) << "width " << width;
    }
    const Matrix<float> large = random.matrix(300, 300 * width_multiple);
    Device one(name(), 1);
    Device three(name(), 3);
    EXPECT_TRUE(same_bits(run(three, large), run(one, large)));
  }
};

TEST_P(RowsTest, RmsNorm) {
  check(11, 1, [](Device& device, const Matrix<float>& x) {
    const Tensor out = device.make_f32(x.rows, x.cols, 2);
    const Tensor weight = device.put(Random(110).matrix(1, x.cols));
    device.ops().rms_norm(device.stream(), device.put(x, 1), weight, 1e-6F, out);
    return device.get_f32(out);
  });
}

TEST_P(RowsTest, RmsNormPerHeadInPlace) {
  check(12, 3, [](Device& device, const Matrix<float>& x) {
    const Tensor tensor = device.put(x);
    const Tensor weight = device.put(Random(120).matrix(1, x.cols / 3));
    device.ops().rms_norm(device.stream(), tensor, weight, 1e-6F, tensor);
    return device.get_f32(tensor);
  });
}

TEST_P(RowsTest, AddRmsNorm) {
  check(13, 2, [](Device& device, const Matrix<float>& x) {
    const int64_t cols = x.cols / 2;
    const Tensor both = device.put(x);
    const Tensor residual = both.col_slice(0, cols);
    const Tensor out = device.make_f32(x.rows, cols);
    const Tensor weight = device.put(Random(130).matrix(1, cols));
    device.ops().add_rms_norm(device.stream(), residual, both.col_slice(cols, cols), weight, 1e-5F, out);
    Matrix<float> result = device.get_f32(out);
    const Matrix<float> sum = device.get_f32(residual);
    result.rows *= 2;  // both outputs, interleaved by row so that slices stay slices
    std::vector<float> rows;
    for (int64_t r = 0; r < x.rows; ++r) {
      rows.insert(rows.end(), result.row(r), result.row(r) + cols);
      rows.insert(rows.end(), sum.row(r), sum.row(r) + cols);
    }
    return Matrix<float>(x.rows, 2 * cols, rows);
  });
}

TEST_P(RowsTest, Add) {
  check(14, 2, [](Device& device, const Matrix<float>& x) {
    const Tensor both = device.put(x);
    const Tensor sum = both.col_slice(0, x.cols / 2);
    device.ops().add(device.stream(), sum, both.col_slice(x.cols / 2, x.cols / 2));
    return device.get_f32(sum);
  });
}

TEST_P(RowsTest, SiluMul) {
  check(15, 2, [](Device& device, const Matrix<float>& x) {
    const Tensor out = device.make_f32(x.rows, x.cols / 2, 1);
    device.ops().silu_mul(device.stream(), device.put(x), out);
    return device.get_f32(out);
  });
}

TEST_P(RowsTest, Rope) {
  for (const bool interleaved : {false, true}) {
    check(16, 6, [interleaved](Device& device, const Matrix<float>& x) {  // 2 heads of dim + dim / 2 columns
      const int64_t dim = x.cols / 3;
      const Tensor tensor = device.put(x);
      const Tensor table = device.put(Random(160).matrix(5, dim));
      std::vector<int32_t> positions;
      for (int64_t r = 0; r < x.rows; ++r) positions.push_back(static_cast<int32_t>(std::abs(x.at(r, 0)) * 100) % 5);
      device.ops().rope(device.stream(), tensor, 2, dim + dim / 2, dim, device.put_column(positions), table,
                        interleaved);
      return device.get_f32(tensor);
    });
  }
}

TEST_P(RowsTest, Combine) {
  check(17, 4, [](Device& device, const Matrix<float>& x) {  // 4 terms per row
    const int64_t cols = x.cols / 4;
    Matrix<float> weights(x.rows, 4);
    for (int64_t r = 0; r < x.rows; ++r) {
      for (int64_t j = 0; j < 4; ++j) weights.row(r)[j] = x.at(r, j * cols) * 0.5F;
    }
    const Tensor out = device.make_f32(x.rows, cols, 3);
    const Matrix<float> terms(x.rows * 4, cols, x.values);
    device.ops().combine(device.stream(), device.put(terms, 2), device.put(weights, 1), out);
    return device.get_f32(out);
  });
}

TEST_P(RowsTest, GatherRows) {
  Random random(18);
  Device device(name());
  const Matrix<float> x = random.matrix(9, 21);
  const Tensor out = device.make_f32(4, 21, 1);
  device.ops().gather_rows(device.stream(), device.put(x), device.put_column<int32_t>({8, 0, 8, 3}), out);
  EXPECT_TRUE(same_bits(device.get_f32(out), x.permuted({8, 0, 8, 3})));
}

// silu(x) = x / (1 + e^-x) shows e over its whole range. Below -88.7 the f32 sum is infinite, so silu is -0 there
// instead of about -3e-37.
TEST_P(RowsTest, ExponentialIsAccurateEverywhere) {
  Device device(name());
  Matrix<float> gate_up(1, 2 * 4001);
  for (int64_t i = 0; i < 4001; ++i) {
    gate_up.row(0)[i] = static_cast<float>(i - 2000) * 0.06F;
    gate_up.row(0)[4001 + i] = 1.0F;
  }
  const Tensor out = device.make_f32(1, 4001);
  device.ops().silu_mul(device.stream(), device.put(gate_up), out);
  const Matrix<float> result = device.get_f32(out);
  for (int64_t i = 0; i < 4001; ++i) {
    const double x = static_cast<double>(gate_up.at(0, i));
    const double expected = x / (1.0 + std::exp(-x));
    EXPECT_NEAR(static_cast<double>(result.at(0, i)), expected, 4e-7 * std::abs(expected) + 4e-37) << x;
  }
}

// A value's bits do not depend on its column, so tails are computed like whole vectors.
TEST_P(RowsTest, AValueDoesNotDependOnItsColumn) {
  Device device(name());
  Random random(19);
  for (int64_t width = 1; width < 40; ++width) {
    const float gate = random.normal();
    const float up = random.normal();
    Matrix<float> gate_up(1, 2 * width);
    std::fill_n(gate_up.row(0), width, gate);
    std::fill_n(gate_up.row(0) + width, width, up);
    const Tensor out = device.make_f32(1, width);
    device.ops().silu_mul(device.stream(), device.put(gate_up), out);
    const Matrix<float> result = device.get_f32(out);
    for (int64_t i = 1; i < width; ++i) EXPECT_EQ(result.at(0, i), result.at(0, 0)) << width;
  }
}

TANDEM_FOR_ALL_BACKENDS(RowsTest);

}  // namespace
}  // namespace tandem::kernels
