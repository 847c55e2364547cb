// Number formats against their definitions, and weights decoded from checkpoints.
#include "src/kernels/convert.h"

#include <gmock/gmock.h>

#include <bit>
#include <cmath>
#include <limits>

#include "src/kernels/host_matrix.h"
#include "src/kernels/test_support.h"

namespace tandem::kernels {
namespace {

TEST(Fp8, AllCodesFollowTheDefinition) {
  for (int code = 0; code < 256; ++code) {
    const int exponent = (code >> 3) & 15;
    const int mantissa = code & 7;
    const float value = float_from_f8e4m3(static_cast<uint8_t>(code));
    EXPECT_EQ(std::signbit(value), code >= 128 && !std::isnan(value)) << code;
    if (exponent == 15 && mantissa == 7) {
      EXPECT_TRUE(std::isnan(value)) << code;
      continue;
    }
    const double magnitude =
        exponent == 0 ? mantissa / 8.0 * std::exp2(-6) : (1 + mantissa / 8.0) * std::exp2(exponent - 7);
    EXPECT_EQ(static_cast<double>(value), code >= 128 ? -magnitude : magnitude) << code;
    EXPECT_EQ(value, f8e4m3_table()[static_cast<size_t>(code)]);
  }
  EXPECT_EQ(float_from_f8e4m3(0x7E), 448.0F);
  EXPECT_EQ(float_from_f8e4m3(0x01), 0.001953125F);
  EXPECT_EQ(float_from_f8e4m3(0x38), 1.0F);
}

TEST(Bf16, RoundsToNearestEven) {
  EXPECT_EQ(bf16_from_float(1.0F), 0x3F80);
  EXPECT_EQ(bf16_from_float(std::bit_cast<float>(0x3F808000U)), 0x3F80);  // tie, even below
  EXPECT_EQ(bf16_from_float(std::bit_cast<float>(0x3F818000U)), 0x3F82);  // tie, even above
  EXPECT_EQ(bf16_from_float(std::bit_cast<float>(0x3F808001U)), 0x3F81);
  EXPECT_EQ(bf16_from_float(std::numeric_limits<float>::max()), 0x7F80);  // rounds up to infinity
  EXPECT_EQ(bf16_from_float(-0.0F), 0x8000);
  EXPECT_TRUE(std::isnan(float_from_bf16(bf16_from_float(std::bit_cast<float>(0x7F800001U)))));
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = float_from_bf16(static_cast<uint16_t>(bits));
    if (std::isnan(value)) continue;
    EXPECT_EQ(bf16_from_float(value), bits);
  }
}

TEST(F16, RoundsToTheNearestCodeAndTiesToEven) {
  for (uint16_t code = 0; code < 0x7C00; ++code) {
    const float value = float_from_f16(code);
    ASSERT_EQ(f16_from_float(value), code);
    ASSERT_EQ(f16_from_float(-value), code | 0x8000);
    ASSERT_TRUE(is_f16(value));
    const float next = code == 0x7BFF ? 65536.0F : float_from_f16(static_cast<uint16_t>(code + 1));
    const float middle = (value + next) / 2;
    ASSERT_EQ(f16_from_float(middle), code + code % 2);
    ASSERT_EQ(f16_from_float(std::nextafter(middle, 0.0F)), code);
    ASSERT_EQ(f16_from_float(std::nextafter(middle, 1e9F)), code + 1);
    ASSERT_FALSE(is_f16(middle));
  }
  EXPECT_EQ(f16_from_float(1e9F), 0x7C00);
  EXPECT_EQ(f16_from_float(1e-30F), 0);
  EXPECT_EQ(f16_from_float(-std::numeric_limits<float>::infinity()), 0xFC00);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(float_from_f16(f16_from_float(nan))));
  EXPECT_FALSE(is_f16(nan));
}

TEST(Fp8, RoundsToTheNearestCodeAndTiesToEven) {
  for (uint8_t code = 0; code < 0x7F; ++code) {
    const float value = float_from_f8e4m3(code);
    EXPECT_EQ(f8e4m3_from_float(value), code);
    EXPECT_EQ(f8e4m3_from_float(-value), code | 0x80);
    if (code == 0x7E) break;
    const float middle = (value + float_from_f8e4m3(static_cast<uint8_t>(code + 1))) / 2;
    EXPECT_EQ(f8e4m3_from_float(middle), code + code % 2);
    EXPECT_EQ(f8e4m3_from_float(std::nextafter(middle, 0.0F)), code);
    EXPECT_EQ(f8e4m3_from_float(std::nextafter(middle, 1e9F)), code + 1);
  }
  EXPECT_EQ(f8e4m3_from_float(1e9F), 0x7E);  // saturates
}

TEST(Fp8, TheLargestMagnitudeOfAVectorIs448) {
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<uint8_t> codes(3);
  const std::vector<float> values{0.5F, -3.0F, 0.0F};
  const float scale = quantize_f8e4m3(values.data(), 3, codes.data());
  EXPECT_EQ(scale, 3.0F / 448.0F);
  EXPECT_THAT(codes, testing::ElementsAre(f8e4m3_from_float(0.5F / scale), 0xFE, 0));
  const std::vector<float> tiny{1e-31F, 0.0F, -1e-35F};
  EXPECT_EQ(quantize_f8e4m3(tiny.data(), 3, codes.data()), 0.0F);
  EXPECT_THAT(codes, testing::ElementsAre(0, 0, 0));
  for (const float bad : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
    const std::vector<float> spoilt{1.0F, bad, 2.0F};
    EXPECT_TRUE(std::isnan(quantize_f8e4m3(spoilt.data(), 3, codes.data())));
    EXPECT_THAT(codes, testing::ElementsAre(0, 0, 0));
  }
}

TEST(F16, KnownValues) {
  EXPECT_EQ(float_from_f16(0x3C00), 1.0F);
  EXPECT_EQ(float_from_f16(0xC000), -2.0F);
  EXPECT_EQ(float_from_f16(0x7BFF), 65504.0F);
  EXPECT_EQ(float_from_f16(0x0001), std::exp2(-24.0F));
  EXPECT_EQ(float_from_f16(0x0400), std::exp2(-14.0F));
  EXPECT_TRUE(std::isinf(float_from_f16(0x7C00)));
  EXPECT_TRUE(std::isnan(float_from_f16(0x7C01)));
}

TEST(F16, EveryFiniteValueIsWhatItsBitsSay) {
  for (int bits = 0; bits < 65536; ++bits) {
    const int exponent = bits >> 10 & 31;
    const int mantissa = bits & 1023;
    if (exponent == 31) continue;
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
    const double expected = bits >= 32768 ? -magnitude : magnitude;
    EXPECT_EQ(float_from_f16(static_cast<uint16_t>(bits)), expected) << bits;
  }
}

TEST(HostMatrix, Fp8BlocksTakeTheScaleOfTheirBlock) {
  // 3 x 5 in blocks of 2 x 2: six scales, ragged at both ends. Every code is 1.0, so the scales themselves come out.
  const std::vector<uint8_t> codes(15, 0x38);
  const std::vector<float> scales{1, 2, 3, 4, 5, 6};
  HostMatrix matrix{.data = reinterpret_cast<const std::byte*>(codes.data()),
                    .dtype = DType::kF8E4M3,
                    .n = 3,
                    .k = 5,
                    .scales = reinterpret_cast<const std::byte*>(scales.data()),
                    .scales_dtype = DType::kF32,
                    .block_n = 2,
                    .block_k = 2};
  std::vector<float> row(5);
  decode_row(matrix, 1, 0, 5, row.data());
  EXPECT_THAT(row, testing::ElementsAre(1, 1, 2, 2, 3));
  decode_row(matrix, 2, 0, 5, row.data());
  EXPECT_THAT(row, testing::ElementsAre(4, 4, 5, 5, 6));
  decode_row(matrix, 2, 3, 2, row.data());
  EXPECT_THAT((std::vector<float>{row[0], row[1]}), testing::ElementsAre(5, 6));

  const std::vector<uint16_t> scales_bf16{0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0};  // 1 … 6
  matrix.scales = reinterpret_cast<const std::byte*>(scales_bf16.data());
  matrix.scales_dtype = DType::kBf16;
  decode_row(matrix, 0, 0, 5, row.data());
  EXPECT_THAT(row, testing::ElementsAre(1, 1, 2, 2, 3));
  std::vector<uint16_t> row_bf16(5);
  decode_row_bf16(matrix, 2, 0, 5, row_bf16.data());
  EXPECT_THAT(row_bf16, testing::ElementsAre(0x4080, 0x4080, 0x40A0, 0x40A0, 0x40C0));
}

TEST(HostMatrix, ReadsAnyAlignmentAndStride) {
  std::vector<std::byte> bytes(1 + 2 * 3 * sizeof(uint16_t));
  const std::vector<uint16_t> values{0x3F80, 0x4000, 0xFFFF, 0x4040, 0x4080, 0xFFFF};  // third column is padding
  std::memcpy(bytes.data() + 1, values.data(), values.size() * sizeof(uint16_t));
  const HostMatrix matrix{.data = bytes.data() + 1, .dtype = DType::kBf16, .n = 2, .k = 2, .row_stride = 3};
  std::vector<float> row(2);
  decode_row(matrix, 1, 0, 2, row.data());
  EXPECT_THAT(row, testing::ElementsAre(3, 4));
}

}  // namespace
}  // namespace tandem::kernels
