// A child on one core, and what it uses: processor time and memory.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "src/base/result.h"

namespace tandem::bench {

// The cores this process may run on, ascending.
std::vector<int> usable_cpus();
void pin_this_thread(int cpu);

class PinnedProcess {
 public:
  // As cluster::spawn_process, with all its threads on `cpu`.
  static Result<PinnedProcess> start(const std::string& program, const std::vector<std::string>& arguments,
                                     const std::string& log_path, int cpu);
  PinnedProcess(PinnedProcess&& other) noexcept;
  PinnedProcess& operator=(PinnedProcess&&) = delete;
  ~PinnedProcess();  // SIGTERM, and SIGKILL if that is not enough

  // Processor time of all its threads, user and system, in seconds since it started.
  double cpu_seconds() const;
  int64_t resident_bytes() const;
  bool is_running();
  pid_t pid() const { return pid_; }

 private:
  explicit PinnedProcess(pid_t pid) : pid_(pid) {}
  pid_t pid_;  // -1: moved from, or waited for
};

// Least squares through (xs, ys): the growth of y for each 1 of x; 0 for fewer than two different xs.
double slope_of(const std::vector<double>& xs, const std::vector<double>& ys);

}  // namespace tandem::bench
