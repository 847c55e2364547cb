// Helpers of the kernels' tests: host matrices, random numbers with a printed seed, and a device that owns what a test
// allocates.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "src/kernels/convert.h"
#include "src/kernels/ops.h"

namespace tandem::kernels {

// A dense row-major matrix in host memory.
template <typename T>
struct Matrix {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<T> values;

  Matrix() = default;
  Matrix(int64_t r, int64_t c) : rows(r), cols(c), values(static_cast<size_t>(r * c)) {}
  Matrix(int64_t r, int64_t c, std::vector<T> v) : rows(r), cols(c), values(std::move(v)) {}
  T* row(int64_t r) { return values.data() + r * cols; }
  const T* row(int64_t r) const { return values.data() + r * cols; }
  T at(int64_t r, int64_t c) const { return values[static_cast<size_t>(r * cols + c)]; }

  Matrix rows_slice(int64_t first, int64_t count) const {
    return Matrix(count, cols, std::vector<T>(values.begin() + first * cols, values.begin() + (first + count) * cols));
  }
  // Row i is row order[i] of this.
  Matrix permuted(const std::vector<int32_t>& order) const {
    Matrix result(static_cast<int64_t>(order.size()), cols);
    for (int64_t r = 0; r < result.rows; ++r) std::copy_n(row(order[static_cast<size_t>(r)]), cols, result.row(r));
    return result;
  }
};

template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return DType::kF32;
  if constexpr (std::is_same_v<T, uint16_t>) return DType::kBf16;
  if constexpr (std::is_same_v<T, int32_t>) return DType::kI32;
  if constexpr (std::is_same_v<T, int64_t>) return DType::kI64;
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) { std::cout << "seed " << seed << '\n'; }
  float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(engine_); }
  float normal() { return std::normal_distribution<float>()(engine_); }
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  Matrix<float> matrix(int64_t rows, int64_t cols, float scale = 1.0F) {
    Matrix<float> result(rows, cols);
    for (float& value : result.values) value = scale * normal();
    return result;
  }
  // 0 … count - 1 in random order.
  std::vector<int32_t> permutation(int64_t count) {
    std::vector<int32_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), engine_);
    return order;
  }
  template <typename Container>
  void shuffle(Container& container) {
    std::shuffle(container.begin(), container.end(), engine_);
  }

 private:
  std::mt19937_64 engine_;
};

// One of every kind of weight.
inline constexpr WeightFormat kTestedFormats[] = {kF32Weights,
                                                  kBf16Weights,
                                                  kBf16WeightsWideInput,
                                                  {WeightType::kInt8, 0, 8},
                                                  {WeightType::kInt8, 0, 16},
                                                  {WeightType::kInt4, 32, 8},
                                                  {WeightType::kInt4, 0, 16}};

// Tests run once for each of these; those that the machine lacks are skipped, visibly.
inline constexpr const char* kAllBackends[] = {"cpu-avx512-bf16", "cpu-avx512-vnni", "cpu-avx512", "cpu-avx2", "ref"};

class BackendTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const std::vector<std::string> backends = available_backends();
    if (std::find(backends.begin(), backends.end(), GetParam()) == backends.end()) {
      GTEST_SKIP() << "this machine cannot run " << GetParam();
    }
  }
  std::string name() const { return GetParam(); }
  // Whether products with bf16 weights round x to bf16 first.
  bool rounds_x(WeightFormat format) const { return format == kBf16Weights && name() == "cpu-avx512-bf16"; }
};

inline std::string backend_test_name(const testing::TestParamInfo<const char*>& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}
#define TANDEM_FOR_ALL_BACKENDS(Suite) \
  INSTANTIATE_TEST_SUITE_P(All, Suite, testing::ValuesIn(kAllBackends), backend_test_name)

// One backend with a stream; frees everything it lent at the end.
class Device {
 public:
  explicit Device(const std::string& name, int threads = 1) {
    Result<std::unique_ptr<Ops>> made = make_ops(name, threads);
    CHECK(made.ok());
    ops_ = std::move(made).value();
    stream_ = ops_->make_stream();
  }

  Ops& ops() { return *ops_; }
  Stream& stream() { return *stream_; }

  // Uninitialised outputs hold `fill`, so that an element nobody wrote shows. `padding` columns separate the rows.
  Tensor make(DType dtype, int64_t rows, int64_t cols, int64_t padding = 0, uint8_t fill = 0xFF) {
    const int64_t stride = cols + padding;
    const int64_t bytes = rows * stride * dtype_bytes(dtype);
    buffers_.push_back(ops_->allocate(bytes));
    const std::vector<std::byte> filling(static_cast<size_t>(bytes), std::byte{fill});
    ops_->upload(*stream_, buffers_.back()->address(), filling);
    return Tensor{buffers_.back()->address(), dtype, rows, cols, stride};
  }
  Tensor make_f32(int64_t rows, int64_t cols, int64_t padding = 0) { return make(DType::kF32, rows, cols, padding); }

  template <typename T>
  Tensor put(const Matrix<T>& matrix, int64_t padding = 0) {
    const Tensor tensor = make(dtype_of<T>(), matrix.rows, matrix.cols, padding);
    for (int64_t r = 0; r < matrix.rows; ++r) {
      const std::span<const T> row(matrix.row(r), static_cast<size_t>(matrix.cols));
      ops_->upload(*stream_, tensor.address + r * tensor.stride * int64_t{sizeof(T)}, std::as_bytes(row));
    }
    return tensor;
  }
  template <typename T>
  Tensor put_column(const std::vector<T>& values) {
    return put(Matrix<T>(static_cast<int64_t>(values.size()), 1, values));
  }

  template <typename T>
  Matrix<T> get(const Tensor& tensor) {
    Matrix<T> matrix(tensor.rows, tensor.cols);
    for (int64_t r = 0; r < tensor.rows; ++r) {
      const std::span<T> row(matrix.row(r), static_cast<size_t>(tensor.cols));
      ops_->read_back(*stream_, tensor.address + r * tensor.stride * int64_t{sizeof(T)}, std::as_writable_bytes(row));
    }
    return matrix;
  }
  Matrix<float> get_f32(const Tensor& tensor) { return get<float>(tensor); }

  // Packs `batch` matrices stacked in the rows of `values`.
  std::unique_ptr<Weight> pack(const Matrix<float>& values, WeightFormat format, int64_t batch = 1) {
    std::vector<HostMatrix> matrices;
    const int64_t n = values.rows / batch;
    for (int64_t b = 0; b < batch; ++b) {
      matrices.push_back(HostMatrix{.data = reinterpret_cast<const std::byte*>(values.row(b * n)),
                                    .dtype = DType::kF32,
                                    .n = n,
                                    .k = values.cols});
    }
    return ops_->pack_weight(matrices, format);
  }

 private:
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<Stream> stream_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
};

// Bit for bit, so that -0 differs from +0 and a NaN equals itself.
template <typename T>
bool same_bits(const Matrix<T>& a, const Matrix<T>& b) {
  return a.rows == b.rows && a.cols == b.cols &&
         (a.values.empty() || std::memcmp(a.values.data(), b.values.data(), a.values.size() * sizeof(T)) == 0);
}

// Largest |a - b| over the largest |b|; NaN anywhere gives infinity.
inline float relative_error(const Matrix<float>& a, const Matrix<float>& b) {
  EXPECT_EQ(a.values.size(), b.values.size());
  float difference = 0.0F;
  float largest = 1e-30F;
  for (size_t i = 0; i < std::min(a.values.size(), b.values.size()); ++i) {
    const float gap = std::abs(a.values[i] - b.values[i]);
    if (!(gap <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::infinity();
    difference = std::max(difference, gap);
    largest = std::max(largest, std::abs(b.values[i]));
  }
  return difference / largest;
}

}  // namespace tandem::kernels
