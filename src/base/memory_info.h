// How much memory this process may still take.
#pragma once

#include <cstdint>
#include <string>

namespace tandem {

struct AvailableMemory {
  int64_t bytes = 0;
  std::string limited_by;  // "MemAvailable" of the kernel, or the cgroup file that allows less
};

// The smaller of MemAvailable and what the limits of this process's control group (version 1 or 2, and every group
// above it) leave; file pages that the kernel would drop count as free. `root` is put in front of /proc and /sys.
AvailableMemory available_memory(const std::string& root = "");

}  // namespace tandem
