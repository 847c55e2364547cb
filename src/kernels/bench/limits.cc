#include "src/kernels/bench/limits.h"

#include <algorithm>
#include <chrono>

#include "src/base/check.h"
#include "src/kernels/cpu/isa_choice.h"

namespace tandem::kernels {
namespace {

constexpr int64_t kReadBytes = int64_t{256} << 20;
constexpr int64_t kRounds = 1 << 18;  // about a millisecond
constexpr int kRepetitions = 9;
constexpr int64_t kSinkStride = 16;  // a cache line each

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

const cpu::Isa& isa_with_limits(std::string_view backend) {
  const cpu::Isa* isa = cpu::find_isa(backend);
  return isa == nullptr ? *cpu::possible_isas().front() : *isa;
}

}  // namespace

double median(std::vector<double> values) {
  CHECK_GT(values.size(), 0U);
  const auto middle = values.begin() + std::ssize(values) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

LimitMeter::LimitMeter(const cpu::Isa& isa, int threads)
    : isa_(isa), pool_(threads), memory_(kReadBytes), sinks_(static_cast<size_t>(threads * kSinkStride)) {
  std::fill_n(memory_.address(), kReadBytes, std::byte{1});  // untouched pages would all be the same page of zeros
}

LimitMeter::LimitMeter(std::string_view backend, int threads) : LimitMeter(isa_with_limits(backend), threads) {}

double LimitMeter::seconds_of(const std::function<void(int64_t thread)>& loop) {
  const double start = seconds_now();
  pool_.run(pool_.num_threads(), [&](int64_t thread, int) { loop(thread); });
  return seconds_now() - start;
}

double LimitMeter::sample_gflops() {
  const double seconds =
      seconds_of([&](int64_t thread) { sinks_[static_cast<size_t>(thread * kSinkStride)] = isa_.run_fma(kRounds); });
  return static_cast<double>(isa_.fma_flops_per_round * kRounds * pool_.num_threads()) / seconds * 1e-9;
}

double LimitMeter::sample_byte_gops() {
  const double seconds = seconds_of([&](int64_t thread) {
    sinks_[static_cast<size_t>(thread * kSinkStride)] = static_cast<float>(isa_.run_dot(kRounds));
  });
  return static_cast<double>(isa_.dot_ops_per_round * kRounds * pool_.num_threads()) / seconds * 1e-9;
}

double LimitMeter::sample_read_gbytes() {
  const int64_t share = kReadBytes / pool_.num_threads();
  const double seconds = seconds_of([&](int64_t thread) {
    sinks_[static_cast<size_t>(thread * kSinkStride)] = isa_.run_read(memory_.address() + thread * share, share);
  });
  return static_cast<double>(share * pool_.num_threads()) / seconds * 1e-9;
}

Rates measure_beside_limits(LimitMeter& meter, const std::function<void()>& run, double ops, double bytes,
                            bool of_bytes) {
  std::vector<double> seconds, limits_gops, limits_gbytes, ops_shares, bytes_shares;
  const auto sample_gops = [&] { return of_bytes ? meter.sample_byte_gops() : meter.sample_gflops(); };
  run();  // the first fills page tables and asks for memory
  double gops_before = sample_gops();
  double gbytes_before = meter.sample_read_gbytes();
  for (int i = 0; i < kRepetitions; ++i) {
    const double start = seconds_now();
    run();
    seconds.push_back(seconds_now() - start);
    const double gbytes_after = meter.sample_read_gbytes();
    const double gops_after = sample_gops();
    limits_gops.push_back((gops_before + gops_after) / 2);
    limits_gbytes.push_back((gbytes_before + gbytes_after) / 2);
    ops_shares.push_back(ops / seconds.back() * 1e-9 / limits_gops.back());
    bytes_shares.push_back(bytes / seconds.back() * 1e-9 / limits_gbytes.back());
    gops_before = gops_after;
    gbytes_before = gbytes_after;
  }
  const double middle = median(seconds);
  return {.seconds = middle,
          .gops = ops / middle * 1e-9,
          .gbytes = bytes / middle * 1e-9,
          .limit_gops = median(limits_gops),
          .limit_gbytes = median(limits_gbytes),
          .ops_share = median(ops_shares),
          .bytes_share = median(bytes_shares)};
}

}  // namespace tandem::kernels
