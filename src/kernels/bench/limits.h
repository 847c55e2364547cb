// What this machine can do at most, measured while a kernel is: a shared machine changes its limits within a second.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "src/kernels/cpu/isa.h"
#include "src/kernels/cpu/thread_pool.h"
#include "src/kernels/host_ops.h"

namespace tandem::kernels {

// Loops that do nothing but what kernels are limited by. Each sample takes some milliseconds.
class LimitMeter {
 public:
  // The limits as `threads` threads reach them with the instructions of `isa`.
  LimitMeter(const cpu::Isa& isa, int threads);
  // The same for the backend of that name; the plain one has no limits of its own and gets those of the best.
  LimitMeter(std::string_view backend, int threads);

  double sample_gflops();       // f32 multiply-adds, each counted as two
  double sample_byte_gops();    // products of 8-bit integers, added up, likewise
  double sample_read_gbytes();  // 1e9 bytes per second, of memory far larger than the caches

 private:
  double seconds_of(const std::function<void(int64_t thread)>& loop);

  const cpu::Isa& isa_;
  cpu::ThreadPool pool_;
  HostBuffer memory_;
  std::vector<float> sinks_;  // results, or the compiler would drop the loops
};

struct Rates {
  double seconds;       // of one run
  double gops;          // 1e9 operations per second
  double gbytes;        // 1e9 bytes per second
  double limit_gops;    // measured before and after each run
  double limit_gbytes;  // likewise
  double ops_share;     // of the limit, run by run
  double bytes_share;
};

// Runs `run` some times, each between two samples of the limits; the medians. `of_bytes`: operations are those of 8-bit
// integers.
Rates measure_beside_limits(LimitMeter& meter, const std::function<void()>& run, double ops, double bytes,
                            bool of_bytes);

double median(std::vector<double> values);

}  // namespace tandem::kernels
