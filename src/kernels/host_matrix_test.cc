#include "src/kernels/host_matrix.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace tandem::kernels {
namespace {

// Lengths around the eight codes that are read at a time, and rows that start anywhere.
TEST(HostMatrixTest, LoadsCodesOfEveryLength) {
  constexpr uint32_t kSeed = 7;
  SCOPED_TRACE(kSeed);
  std::mt19937 random(kSeed);
  for (const DType dtype : {DType::kI8, DType::kU4}) {
    for (int64_t k = 1; k <= 33; ++k) {
      for (const int64_t stride : {k, k + 6}) {
        constexpr int64_t kRows = 3;
        const int64_t row_bytes = dtype == DType::kI8 ? stride : (stride + 1) / 2;
        std::vector<std::byte> data(static_cast<size_t>(kRows * row_bytes));
        for (std::byte& byte : data) byte = static_cast<std::byte>(random());
        const HostMatrix matrix{.data = data.data(), .dtype = dtype, .n = kRows, .k = k, .row_stride = stride};
        for (int64_t n = 0; n < kRows; ++n) {
          std::vector<uint8_t> codes(static_cast<size_t>(k) + 1, 0xEE);
          load_codes(matrix, n, codes.data());
          for (int64_t i = 0; i < k; ++i) {
            const auto byte =
                static_cast<unsigned>(data[static_cast<size_t>(n * row_bytes + (dtype == DType::kI8 ? i : i / 2))]);
            const unsigned expected = dtype == DType::kI8 ? (byte + 128) % 256 : (i % 2 == 0 ? byte % 16 : byte / 16);
            EXPECT_EQ(codes[static_cast<size_t>(i)], expected)
                << dtype_name(dtype) << " k=" << k << " at " << n << ", " << i;
          }
          EXPECT_EQ(codes.back(), 0xEE) << "written beyond the row";
        }
      }
    }
  }
}

}  // namespace
}  // namespace tandem::kernels
