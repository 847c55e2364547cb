// Limits of the control group (version 1 or 2) that this process runs in, as containers set them.
#pragma once

#include <functional>
#include <optional>
#include <string>

namespace tandem {

// Where one controller of one version keeps its files.
struct ControlGroup {
  std::string line_mark;  // what stands before the group's path in its line of /proc/self/cgroup
  std::string mount;
};

// Calls `visit` with the folder of this process's group and of every group above it; a path that is the host's, and
// so not visible in a container, ends at the mount itself. `root` is put in front of /proc and /sys.
void for_each_group(const std::string& root, const ControlGroup& group,
                    const std::function<void(const std::string& folder)>& visit);

// The number a file begins with; none for "max" or a file that is missing.
std::optional<int64_t> read_leading_number(const std::string& path);

// How many processors' time this process may use; infinity without a limit.
double processor_quota(const std::string& root = "");

}  // namespace tandem
