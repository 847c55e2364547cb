// Integer weights: the definition itself, and that every backend follows it bit for bit.
#include "src/kernels/integer.h"

#include <gmock/gmock.h>

#include "src/kernels/convert.h"
#include "src/kernels/test_support.h"

namespace tandem::kernels {
namespace {

constexpr WeightFormat kFormats[] = {
    {WeightType::kInt8, 0, 8},    {WeightType::kInt8, 0, 16},  {WeightType::kInt8, 32, 8},
    {WeightType::kInt8, 128, 16}, {WeightType::kInt4, 0, 8},   {WeightType::kInt4, 0, 16},
    {WeightType::kInt4, 32, 16},  {WeightType::kInt4, 128, 8}, {WeightType::kInt4, 16, 8}};

HostMatrix host_matrix(const Matrix<float>& values) {
  return HostMatrix{.data = reinterpret_cast<const std::byte*>(values.values.data()),
                    .dtype = DType::kF32,
                    .n = values.rows,
                    .k = values.cols};
}

TEST(IntegerTest, AWeightIsWithinHalfAStep) {
  Random random(41);
  const Matrix<float> values = random.matrix(3, 150);
  for (const WeightFormat& format : kFormats) {
    const int64_t columns = group_columns(150, format);
    for (int64_t n = 0; n < values.rows; ++n) {
      IntegerWeightRow row;
      encode_weight_row(host_matrix(values), n, format, &row);
      ASSERT_EQ(std::ssize(row.scales), count_groups(150, format));
      for (int64_t k = 0; k < 150; ++k) {
        const size_t g = static_cast<size_t>(k / columns);
        const float code = static_cast<float>(row.codes[static_cast<size_t>(k)]) - static_cast<float>(row.zeros[g]);
        EXPECT_LE(std::abs(values.at(n, k) - code * row.scales[g]), 0.5001F * row.scales[g])
            << weight_format_name(format) << " column " << k;
      }
    }
  }
}

TEST(IntegerTest, AnActivationIsWithinHalfAStepAndItsPartsMakeItsCode) {
  Random random(42);
  const Matrix<float> values = random.matrix(1, 333, 50.0F);
  for (const WeightFormat& format : kFormats) {
    IntegerActivationRow row;
    encode_activation_row(values.row(0), 333, format, &row);
    for (int64_t k = 0; k < 333; ++k) {
      const int32_t code = row.codes[static_cast<size_t>(k)];
      const float scale = row.scales[static_cast<size_t>(k / group_columns(333, format))];
      EXPECT_LE(std::abs(values.at(0, k) - static_cast<float>(code) * scale), 0.502F * scale);
      EXPECT_EQ(256 * high_part(code) + low_part(code), code);
      EXPECT_THAT(high_part(code), testing::AllOf(testing::Ge(-128), testing::Le(127)));
      EXPECT_THAT(low_part(code), testing::AllOf(testing::Ge(-128), testing::Le(127)));
    }
  }
}

TEST(IntegerTest, ZeroTinyAndBrokenRows) {
  const WeightFormat format{WeightType::kInt8, 16, 16};
  Matrix<float> values(1, 64);
  values.row(0)[20] = 1e-38F;
  values.row(0)[40] = std::numeric_limits<float>::infinity();
  values.row(0)[50] = std::numeric_limits<float>::quiet_NaN();
  IntegerActivationRow row;
  encode_activation_row(values.row(0), 64, format, &row);
  EXPECT_EQ(row.scales[0], 0.0F);
  EXPECT_EQ(row.scales[1], 0.0F);
  EXPECT_TRUE(std::isnan(row.scales[2]));
  EXPECT_TRUE(std::isnan(row.scales[3]));
  EXPECT_THAT(row.codes, testing::Each(0));
}

class IntegerBackendTest : public BackendTest {
 protected:
  // x times the matrices, side by side, on `backend`.
  static Matrix<float> multiply(const std::string& backend, const Matrix<float>& x, const HostMatrix& w,
                                const WeightFormat& format, int threads = 1) {
    Device device(backend, threads);
    const std::unique_ptr<Weight> weight = device.ops().pack_weight(std::span(&w, 1), format);
    EXPECT_EQ(weight->format(), format);
    const Tensor out = device.make_f32(x.rows, w.n, 3);
    device.ops().linear(device.stream(), device.put(x, 5), *weight, out);
    return device.get_f32(out);
  }
};

TEST_P(IntegerBackendTest, EveryBackendGivesTheReferencesBits) {
  Random random(43);
  struct Shape {
    int64_t rows, n, k;
  };
  // Edges of tiles (2, 4, 8 rows), of panels (16) and groups of them, of padding (16) and groups; 1560 is TBStars'
  // width.
  for (const Shape& shape : {Shape{1, 1, 1}, Shape{1, 70, 64}, Shape{2, 33, 129}, Shape{3, 16, 15}, Shape{5, 48, 257},
                             Shape{9, 31, 512}, Shape{17, 66, 300}, Shape{100, 20, 40}, Shape{4, 17, 1560}}) {
    const Matrix<float> x = random.matrix(shape.rows, shape.k);
    const Matrix<float> w = random.matrix(shape.n, shape.k);
    for (const WeightFormat& format : kFormats) {
      const Matrix<float> expected = multiply("ref", x, host_matrix(w), format);
      for (const int threads : {1, 2}) {
        EXPECT_TRUE(same_bits(multiply(name(), x, host_matrix(w), format, threads), expected))
            << shape.rows << " x " << shape.n << " x " << shape.k << ", " << weight_format_name(format);
      }
    }
  }
}

TEST_P(IntegerBackendTest, StoredCodesScalesAndZerosAreTakenOver) {
  Random random(44);
  constexpr int64_t kN = 37;
  constexpr int64_t kK = 96;
  constexpr int64_t kGroup = 32;
  std::vector<uint8_t> codes(kN * kK);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random.integer(0, 255));
  const Matrix<float> scales = random.matrix(kN, kK / kGroup);
  std::vector<std::byte> zeros(static_cast<size_t>(kN * kK / kGroup));
  for (std::byte& zero : zeros) zero = static_cast<std::byte>(random.integer(0, 15));
  const Matrix<float> x = random.matrix(11, kK);
  for (const DType dtype : {DType::kI8, DType::kU4}) {
    const WeightFormat format{dtype == DType::kI8 ? WeightType::kInt8 : WeightType::kInt4, kGroup, 16};
    const HostMatrix matrix{.data = reinterpret_cast<const std::byte*>(codes.data()),
                            .dtype = dtype,
                            .n = kN,
                            .k = kK,
                            .scales = reinterpret_cast<const std::byte*>(scales.values.data()),
                            .block_n = 1,
                            .block_k = kGroup,
                            .zeros = dtype == DType::kU4 ? zeros.data() : nullptr};
    Matrix<float> dense(kN, kK);
    for (int64_t n = 0; n < kN; ++n) {
      for (int64_t k = 0; k < kK; ++k) {
        const size_t at = static_cast<size_t>(n * kK + k);
        const int nibble = k % 2 == 0 ? codes[at / 2] & 15 : codes[at / 2] >> 4;
        const int zero = std::to_integer<int>(zeros[static_cast<size_t>(n * (kK / kGroup) + k / kGroup)]);
        const int value = dtype == DType::kI8 ? static_cast<int8_t>(codes[at]) : nibble - zero;
        dense.row(n)[k] = static_cast<float>(value) * scales.at(n, k / kGroup);
      }
    }
    const Matrix<float> result = multiply(name(), x, matrix, format);
    EXPECT_TRUE(same_bits(result, multiply("ref", x, matrix, format)));
    EXPECT_LE(relative_error(result, multiply("ref", x, host_matrix(dense), kF32Weights)), 1e-4F);
  }
}

TEST(IntegerTest, ScalesOfGroupsAreRoundedToF16AndCodesFollow) {
  Random random(47);
  Matrix<float> values = random.matrix(4, 128);
  for (int64_t k = 0; k < 128; ++k) {
    values.row(1)[k] *= 1e-4F;  // scales below f16's normal numbers
    values.row(2)[k] *= 1e-6F;  // and below what is rounded
    values.row(3)[k] *= 2e7F;   // above
  }
  for (const WeightFormat& format : {WeightFormat{WeightType::kInt4, 32, 8}, WeightFormat{WeightType::kInt8, 64, 16}}) {
    const WeightFormat whole{format.type, 0, format.activation_bits};
    const int64_t columns = format.group_size;
    for (int64_t n = 0; n < values.rows; ++n) {
      IntegerWeightRow row;
      encode_weight_row(host_matrix(values), n, format, &row);
      for (int64_t g = 0; g < 128 / columns; ++g) {
        // A group alone as a row without groups: its scale is not rounded.
        Matrix<float> group(1, columns);
        std::copy_n(values.row(n) + g * columns, columns, group.row(0));
        IntegerWeightRow exact;
        encode_weight_row(host_matrix(group), 0, whole, &exact);
        const float scale = row.scales[static_cast<size_t>(g)];
        const bool is_rounded = exact.scales[0] >= kLeastRoundedScale && exact.scales[0] <= kMostRoundedScale;
        EXPECT_EQ(is_rounded, n < (format.type == WeightType::kInt8 ? 1 : 2)) << n;
        EXPECT_EQ(scale, is_rounded ? float_from_f16(f16_from_float(exact.scales[0])) : exact.scales[0]);
        EXPECT_LE(std::abs(scale - exact.scales[0]), exact.scales[0] / 256);
        for (int64_t i = 0; i < columns; ++i) {
          const int code = row.codes[static_cast<size_t>(g * columns + i)] - static_cast<int>(middle_code(format.type));
          const int limit = format.type == WeightType::kInt8 ? 127 : 7;
          EXPECT_LE(std::abs(group.at(0, i) - static_cast<float>(code) * scale),
                    std::abs(code) == limit ? scale : 0.5001F * scale);
        }
      }
    }
  }
}

// Scales kept in 16 bits must change nothing. One row whose scales f16 does not hold makes a weight keep all in 32.
TEST_P(IntegerBackendTest, SixteenBitScalesGiveTheBitsOfThirtyTwo) {
  constexpr int64_t kN = 40;
  constexpr int64_t kK = 192;
  for (const uint64_t seed : {48U, 49U, 50U}) {
    Random random(seed);
    for (const WeightFormat& format : kFormats) {
      const int64_t columns = group_columns(kK, format);
      const int64_t groups = count_groups(kK, format);
      std::vector<uint8_t> codes(static_cast<size_t>(kN * kK));
      for (uint8_t& code : codes) code = static_cast<uint8_t>(random.integer(0, 255));
      std::vector<float> scales(static_cast<size_t>(kN * groups));
      for (float& scale : scales) {  // of any size, subnormal ones and zeros included
        const auto bits = static_cast<uint16_t>(random.integer(0, 0x7BFF));
        scale = float_from_f16(random.integer(0, 9) == 0 ? static_cast<uint16_t>(bits & 0x3FF) : bits);
      }
      std::vector<std::byte> zeros(scales.size());
      for (std::byte& zero : zeros) zero = static_cast<std::byte>(random.integer(0, 15));
      const bool is_int4 = format.type == WeightType::kInt4;
      const HostMatrix matrix{.data = reinterpret_cast<const std::byte*>(codes.data()),
                              .dtype = is_int4 ? DType::kU4 : DType::kI8,
                              .n = kN,
                              .k = kK,
                              .scales = reinterpret_cast<const std::byte*>(scales.data()),
                              .block_n = 1,
                              .block_k = columns,
                              .zeros = is_int4 && seed % 2 == 0 ? zeros.data() : nullptr};
      for (const int64_t rows : {1, 2, 7, 20}) {
        const Matrix<float> x = random.matrix(rows, kK);
        const Matrix<float> narrow = multiply(name(), x, matrix, format);
        const float last = scales.back();
        scales.back() = 0.1F;
        Device device(name(), 1);
        const std::unique_ptr<Weight> weight = device.ops().pack_weight(std::span(&matrix, 1), format);
        EXPECT_EQ(weight->scale_dtype(), DType::kF32);
        Matrix<float> wide = multiply(name(), x, matrix, format);
        scales.back() = last;
        for (int64_t r = 0; r < rows; ++r) wide.row(r)[kN - 1] = narrow.at(r, kN - 1);
        EXPECT_TRUE(same_bits(narrow, wide)) << weight_format_name(format) << " seed " << seed;
        EXPECT_TRUE(same_bits(narrow, multiply("ref", x, matrix, format))) << weight_format_name(format);
      }
      Device device(name(), 1);
      const std::unique_ptr<Weight> weight = device.ops().pack_weight(std::span(&matrix, 1), format);
      EXPECT_EQ(weight->scale_dtype(), name() == "ref" ? DType::kF32 : DType::kF16);
    }
  }
}

TEST_P(IntegerBackendTest, WhatIsQuantisedInGroupsHasSixteenBitScales) {
  Random random(51);
  Matrix<float> values = random.matrix(20, 300);
  Device device(name(), 1);
  const auto scales_of = [&](const WeightFormat& format) {
    const HostMatrix matrix = host_matrix(values);
    return device.ops().pack_weight(std::span(&matrix, 1), format)->scale_dtype();
  };
  const DType narrow = name() == "ref" ? DType::kF32 : DType::kF16;
  EXPECT_EQ(scales_of({WeightType::kInt4, 128, 8}), narrow);
  EXPECT_EQ(scales_of({WeightType::kInt4, 0, 8}), DType::kF32);
  for (int64_t k = 0; k < 128; ++k) values.row(19)[k] = 1e-6F;  // a scale too small for f16
  EXPECT_EQ(scales_of({WeightType::kInt4, 128, 8}), DType::kF32);
}

TEST_P(IntegerBackendTest, ABrokenRowStaysAlone) {
  Random random(45);
  Matrix<float> x = random.matrix(30, 50);
  const Matrix<float> w = random.matrix(40, 50);
  for (const WeightFormat& format : kFormats) {
    const Matrix<float> clean = multiply(name(), x, host_matrix(w), format);
    Matrix<float> broken = x;
    broken.row(7)[49] = std::numeric_limits<float>::quiet_NaN();
    broken.row(9)[0] = -std::numeric_limits<float>::infinity();
    const Matrix<float> dirty = multiply(name(), broken, host_matrix(w), format);
    EXPECT_TRUE(std::isnan(dirty.at(7, 0)));
    EXPECT_TRUE(std::isnan(dirty.at(9, 39)));
    EXPECT_TRUE(same_bits(dirty.rows_slice(0, 7), clean.rows_slice(0, 7)));
    EXPECT_TRUE(same_bits(dirty.rows_slice(10, 20), clean.rows_slice(10, 20)));
  }
}

// Measured on normal weights and activations: the errors of rounding to 8 and to 4 bits, far below those of a mistake.
TEST_P(IntegerBackendTest, ErrorAgainstFloatIsThatOfTheRounding) {
  Random random(46);
  const Matrix<float> x = random.matrix(6, 1024);
  const Matrix<float> w = random.matrix(50, 1024);
  const Matrix<float> expected = multiply("ref", x, host_matrix(w), kF32Weights);
  for (const WeightFormat& format : kFormats) {
    const bool is_int4 = format.type == WeightType::kInt4;
    const float error = relative_error(multiply(name(), x, host_matrix(w), format), expected);
    EXPECT_LE(error, is_int4 ? 0.2F : format.activation_bits == 8 ? 0.015F : 0.012F) << weight_format_name(format);
  }
}

TANDEM_FOR_ALL_BACKENDS(IntegerBackendTest);

}  // namespace
}  // namespace tandem::kernels
