#include <algorithm>
#include <array>
#include <cstring>

#include "src/kernels/convert.h"
#include "src/model/sources.h"

namespace tandem::model {
namespace {

using kernels::DType;

constexpr double kStandardDeviation = 0.02;

// Finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014): every counter
// gives an independent-looking word, so any thread can make any element.
uint64_t mix(uint64_t value) {
  value += 0x9E3779B97F4A7C15U;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9U;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBU;
  return value ^ (value >> 31);
}

// FNV-1a.
uint64_t hash_name(std::string_view name) {
  uint64_t hash = 0xCBF29CE484222325U;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3U;
  return hash;
}

// The sum of four random bytes is close to normal: mean 510, variance 4 (256² - 1) / 12 = 147.8². A table of all sums
// makes an element cost one half of a hash and one look-up.
constexpr size_t kSums = 4 * 255 + 1;
constexpr double kSumMean = 510;
constexpr double kSumDeviation = 147.8005412;

float normal_of_sum(size_t sum) {
  return static_cast<float>((static_cast<double>(sum) - kSumMean) / kSumDeviation * kStandardDeviation);
}

std::array<uint16_t, kSums> make_bf16_table() {
  std::array<uint16_t, kSums> table{};
  for (size_t sum = 0; sum < kSums; ++sum) table[sum] = kernels::bf16_from_float(normal_of_sum(sum));
  return table;
}

size_t sum_of_bytes(uint32_t word) {
  return (word & 0xFFU) + ((word >> 8) & 0xFFU) + ((word >> 16) & 0xFFU) + (word >> 24);
}

class DummySource final : public WeightSource {
 public:
  explicit DummySource(uint64_t seed) : seed_(seed), bf16_of_sum_(make_bf16_table()) {}

  // Only what is asked for by its usual name exists, so stacked experts do not.
  bool has(std::string_view) const override { return false; }
  Status check_matrix(const MatrixRef&) const override { return {}; }
  Status check_vector(const std::string&, int64_t) const override { return {}; }
  Status check_values(const MatrixRef&) const override { return {}; }
  bool is_stored() const override { return false; }
  bool is_bf16(const MatrixRef&) const override { return true; }
  void release(const MatrixRef&) const override {}

  kernels::HostMatrix view(const MatrixRef& ref) const override {
    fail_check(__FILE__, __LINE__, "a generated matrix has no view: " + ref.tensor);
  }

  void read_rows(const MatrixRef& ref, int64_t first, int64_t count, DType dtype, std::byte* out) const override {
    CHECK_EQ(dtype, DType::kBf16);
    const uint64_t key = key_of(ref.tensor);
    uint64_t index = static_cast<uint64_t>(first * ref.k);
    const uint64_t end = index + static_cast<uint64_t>(count * ref.k);
    uint16_t* values = reinterpret_cast<uint16_t*>(out);
    if (index % 2 == 1) *values++ = bf16_of_sum_[sum_at(key, index++)];
    for (; index + 1 < end; index += 2) {
      const uint64_t word = mix(key + index / 2);
      *values++ = bf16_of_sum_[sum_of_bytes(static_cast<uint32_t>(word))];
      *values++ = bf16_of_sum_[sum_of_bytes(static_cast<uint32_t>(word >> 32))];
    }
    if (index < end) *values = bf16_of_sum_[sum_at(key, index)];
  }

  std::vector<float> read_vector(const std::string& tensor, int64_t n) const override {
    const float mean = tensor.ends_with("norm.weight") ? 1.0F : 0.0F;
    const uint64_t key = key_of(tensor);
    std::vector<float> values;
    for (uint64_t i = 0; i < static_cast<uint64_t>(n); ++i) values.push_back(mean + normal_of_sum(sum_at(key, i)));
    return values;
  }

  void add_fingerprint(const std::string& tensor, Sha256& hash) const override {
    hash.add(fmt::format("{} dummy {}\n", tensor, seed_));
  }

 private:
  uint64_t key_of(std::string_view tensor) const { return mix(seed_ ^ mix(hash_name(tensor))); }
  static size_t sum_at(uint64_t key, uint64_t index) {
    const uint64_t word = mix(key + index / 2);
    return sum_of_bytes(static_cast<uint32_t>(index % 2 == 0 ? word : word >> 32));
  }

  uint64_t seed_;
  std::array<uint16_t, kSums> bf16_of_sum_;
};

}  // namespace

std::unique_ptr<WeightSource> make_dummy_source(uint64_t seed) { return std::make_unique<DummySource>(seed); }

}  // namespace tandem::model
