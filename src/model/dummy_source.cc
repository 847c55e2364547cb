#include <algorithm>
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

// A tensor is made of runs of kRun elements, each a stretch of one pool of fixed draws that begins at a hashed place:
// copying runs is as fast as memory, and a pool of 128 KiB stays in the cache. A draw is the sum of four random bytes,
// which is close to normal (mean 510, variance 4 (256² - 1) / 12 = 147.8²) and comes out the same on every machine.
constexpr uint64_t kRun = 64;
constexpr uint64_t kRunStarts = 65536;
constexpr uint64_t kDraws = kRunStarts + kRun;
constexpr double kSumMean = 510;
constexpr double kSumDeviation = 147.8005412;

std::vector<float> make_draws() {
  std::vector<float> draws;
  for (uint64_t i = 0; i < kDraws; ++i) {
    const uint64_t word = mix(i);
    const uint64_t sum = (word & 0xFF) + ((word >> 8) & 0xFF) + ((word >> 16) & 0xFF) + ((word >> 24) & 0xFF);
    draws.push_back(static_cast<float>((static_cast<double>(sum) - kSumMean) / kSumDeviation * kStandardDeviation));
  }
  return draws;
}

class DummySource final : public WeightSource {
 public:
  explicit DummySource(uint64_t seed) : seed_(seed), draws_(make_draws()) {
    for (const float draw : draws_) bf16_draws_.push_back(kernels::bf16_from_float(draw));
  }

  // Only what is asked for by its usual name exists, so stacked experts do not.
  bool has(std::string_view) const override { return false; }
  Status check_matrix(const MatrixRef&) const override { return {}; }
  Status check_vector(const std::string&, int64_t) const override { return {}; }
  Status check_values(const MatrixRef&) const override { return {}; }
  std::optional<kernels::WeightFormat> integer_format(const MatrixRef&) const override { return std::nullopt; }
  bool has_zeros(const MatrixRef&) const override { return false; }
  bool has_view(const MatrixRef&) const override { return false; }
  bool is_bf16(const MatrixRef&) const override { return true; }
  void release(const MatrixRef&) const override {}

  kernels::HostMatrix view(const MatrixRef& ref) const override {
    fail_check(__FILE__, __LINE__, "a generated matrix has no view: " + ref.tensor);
  }

  void read_integers(const MatrixRef& ref, int64_t, int64_t, const IntegerRows&) const override {
    fail_check(__FILE__, __LINE__, "a generated matrix has no integers: " + ref.tensor);
  }

  void read_rows(const MatrixRef& ref, int64_t first, int64_t count, DType dtype, std::byte* out) const override {
    CHECK_EQ(dtype, DType::kBf16);
    const uint64_t key = key_of(ref.tensor);
    const uint64_t end = static_cast<uint64_t>((first + count) * ref.k);
    for (uint64_t index = static_cast<uint64_t>(first * ref.k); index < end;) {
      const uint64_t length = std::min(end - index, kRun - index % kRun);
      const size_t bytes = static_cast<size_t>(length) * sizeof(uint16_t);
      std::memcpy(out, &bf16_draws_[draw_of(key, index)], bytes);
      out += bytes;
      index += length;
    }
  }

  std::vector<float> read_vector(const std::string& tensor, int64_t n) const override {
    const float mean = tensor.ends_with("norm.weight") ? 1.0F : 0.0F;
    const uint64_t key = key_of(tensor);
    std::vector<float> values;
    for (uint64_t i = 0; i < static_cast<uint64_t>(n); ++i) values.push_back(mean + draws_[draw_of(key, i)]);
    return values;
  }

  void add_fingerprint(const std::string& tensor, Sha256& hash) const override {
    hash.add(fmt::format("{} dummy {}\n", tensor, seed_));
  }

 private:
  // Where element `index` of a tensor lies in the pool.
  static size_t draw_of(uint64_t key, uint64_t index) {
    return static_cast<size_t>(mix(key + index / kRun) % kRunStarts + index % kRun);
  }
  uint64_t key_of(std::string_view tensor) const { return mix(seed_ ^ mix(hash_name(tensor))); }

  uint64_t seed_;
  std::vector<float> draws_;
  std::vector<uint16_t> bf16_draws_;
};

}  // namespace

std::unique_ptr<WeightSource> make_dummy_source(uint64_t seed) { return std::make_unique<DummySource>(seed); }

}  // namespace tandem::model
