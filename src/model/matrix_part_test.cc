#include "src/model/matrix_part.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "src/kernels/host_matrix.h"
#include "src/kernels/test_support.h"
#include "src/model/integer_rows.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::HostMatrix;
using kernels::WeightFormat;
using kernels::WeightType;
using testing::HasSubstr;

HostMatrix view_of(const std::vector<float>& values, int64_t n, int64_t k) {
  HostMatrix matrix;
  matrix.data = reinterpret_cast<const std::byte*>(values.data());
  matrix.dtype = DType::kF32;
  matrix.n = n;
  matrix.k = k;
  return matrix;
}

std::vector<float> numbered(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  return values;
}

float value_at(const HostMatrix& matrix, int64_t row, int64_t column) {
  float value = 0;
  std::memcpy(&value, matrix.data + (row * matrix.k + column) * 4, 4);
  return value;
}

TEST(MatrixParts, RowsOfEachStackedMatrix) {
  const std::vector<float> values = numbered(8 * 3);  // two matrices of four rows
  for (int32_t index = 0; index < 2; ++index) {
    const HostMatrix whole = view_of(values, 8, 3);
    const MatrixParts parts({&whole, 1}, 2, {Split::kRows, index, 2});
    const HostMatrix& part = parts.matrices().front();
    ASSERT_EQ(part.n, 4);
    ASSERT_EQ(part.k, 3);
    for (int64_t row = 0; row < 4; ++row) {
      const int64_t from = (row < 2 ? 0 : 4) + 2 * index + row % 2;
      for (int64_t column = 0; column < 3; ++column) EXPECT_EQ(value_at(part, row, column), from * 3 + column);
    }
  }
}

TEST(MatrixParts, Columns) {
  const std::vector<float> values = numbered(3 * 8);
  const HostMatrix whole = view_of(values, 3, 8);
  const MatrixParts parts({&whole, 1}, 1, {Split::kColumns, 3, 4});
  const HostMatrix& part = parts.matrices().front();
  ASSERT_EQ(part.n, 3);
  ASSERT_EQ(part.k, 2);
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t column = 0; column < 2; ++column) EXPECT_EQ(value_at(part, row, column), row * 8 + 6 + column);
  }
}

TEST(MatrixParts, TheWholeIsNotCopied) {
  const std::vector<float> values = numbered(4);
  const HostMatrix whole = view_of(values, 2, 2);
  EXPECT_EQ(MatrixParts({&whole, 1}, 1, {Split::kColumns, 0, 1}).matrices().front().data, whole.data);
  EXPECT_EQ(MatrixParts({&whole, 1}, 1, {Split::kNone, 1, 2}).matrices().front().data, whole.data);
}

// A part of integers decodes to the same values as the same part of the whole.
TEST(MatrixParts, IntegersKeepCodesScalesAndZeros) {
  kernels::Random random(71);
  constexpr int64_t kRows = 6;
  constexpr int64_t kColumns = 64;
  for (const WeightFormat format : {WeightFormat{WeightType::kInt8, 0, 8}, WeightFormat{WeightType::kInt8, 16, 8},
                                    WeightFormat{WeightType::kInt4, 0, 8}, WeightFormat{WeightType::kInt4, 16, 16}}) {
    std::vector<float> values(kRows * kColumns);
    for (float& value : values) value = static_cast<float>(random.normal());
    IntegerBuffer buffer;
    const bool has_zeros = format.type == WeightType::kInt4;
    buffer.resize(kRows, kColumns, format, has_zeros);
    ASSERT_TRUE(quantise_rows(values.data(), kRows, kColumns, format, buffer.rows()));
    if (has_zeros) {
      for (int64_t i = 0; i < kRows * buffer.rows().groups; ++i) {
        buffer.rows().zeros[i] = std::byte(static_cast<uint8_t>(random.integer(0, 15)));
      }
    }
    const std::vector<HostMatrix> whole = buffer.matrices(kRows);
    for (const Split split : {Split::kRows, Split::kColumns}) {
      for (int32_t index = 0; index < 2; ++index) {
        const MatrixParts parts(whole, 1, {split, index, 2});
        const HostMatrix& part = parts.matrices().front();
        const int64_t first_row = split == Split::kRows ? index * kRows / 2 : 0;
        const int64_t first_column = split == Split::kColumns ? index * kColumns / 2 : 0;
        std::vector<float> expected(kColumns);
        std::vector<float> found(static_cast<size_t>(part.k));
        for (int64_t row = 0; row < part.n; ++row) {
          kernels::decode_row(whole.front(), first_row + row, 0, kColumns, expected.data());
          kernels::decode_row(part, row, 0, part.k, found.data());
          for (int64_t column = 0; column < part.k; ++column) {
            ASSERT_EQ(found[static_cast<size_t>(column)], expected[static_cast<size_t>(first_column + column)])
                << kernels::weight_format_name(format) << " row " << row << " column " << column;
          }
        }
      }
    }
  }
}

TEST(MatrixParts, WhatCannotBeSharedEvenlyIsRefused) {
  const WeightFormat group{WeightType::kInt8, 32, 8};
  EXPECT_TRUE(check_part("w", 6, 8, kernels::kBf16Weights, {Split::kRows, 0, 3}).ok());
  EXPECT_THAT(check_part("w", 6, 8, kernels::kBf16Weights, {Split::kColumns, 0, 3}).error().message,
              HasSubstr("--tensor-parallel-size 3: tensor \"w\" has 8 columns"));
  EXPECT_TRUE(check_part("w", 6, 64, group, {Split::kColumns, 0, 2}).ok());
  EXPECT_THAT(check_part("w", 6, 96, group, {Split::kColumns, 0, 2}).error().message, HasSubstr("in groups of 32"));
  EXPECT_TRUE(check_part("w", 6, 32, group, {Split::kColumns, 0, 2}).ok());  // one group for the row
  EXPECT_FALSE(check_part("w", 6, 30, {WeightType::kInt4, 0, 8}, {Split::kColumns, 0, 2}).ok());  // half a byte
}

}  // namespace
}  // namespace tandem::model
