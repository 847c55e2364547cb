#include "src/base/control_group.h"

#include <algorithm>
#include <fstream>
#include <limits>

namespace tandem {
namespace {

std::string find_group(const std::string& root, const ControlGroup& group) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t at = line.find(group.line_mark);
    if (at != std::string::npos) return line.substr(at + group.line_mark.size());
  }
  return "/";
}

}  // namespace

void for_each_group(const std::string& root, const ControlGroup& group,
                    const std::function<void(const std::string& folder)>& visit) {
  std::string path = find_group(root, group);
  while (true) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    visit(root + group.mount + path + "/");
    if (path.empty()) return;
    path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  }
}

std::optional<int64_t> read_leading_number(const std::string& path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;
}

double processor_quota(const std::string& root) {
  double quota = std::numeric_limits<double>::infinity();
  const auto apply = [&quota](int64_t time_us, int64_t period_us) {
    if (time_us > 0 && period_us > 0)
      quota = std::min(quota, static_cast<double>(time_us) / static_cast<double>(period_us));
  };
  for_each_group(root, {"0::", "/sys/fs/cgroup"}, [&](const std::string& folder) {
    std::ifstream file(folder + "cpu.max");
    int64_t time_us = 0;
    int64_t period_us = 0;
    if (file >> time_us >> period_us) apply(time_us, period_us);  // "max" is no number
  });
  for (const char* controllers : {":cpu,cpuacct:", ":cpu:"}) {
    for_each_group(root, {controllers, "/sys/fs/cgroup/cpu"}, [&](const std::string& folder) {
      apply(read_leading_number(folder + "cpu.cfs_quota_us").value_or(0),
            read_leading_number(folder + "cpu.cfs_period_us").value_or(0));
    });
  }
  return quota;
}

}  // namespace tandem
