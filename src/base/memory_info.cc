#include "src/base/memory_info.h"

#include <fstream>
#include <limits>
#include <optional>
#include <sstream>

#include "src/base/control_group.h"

namespace tandem {
namespace {

// The number after `key` in a file of "key number" lines.
std::optional<int64_t> read_field(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    int64_t value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return std::nullopt;
}

struct CgroupFiles {
  ControlGroup group;
  std::string limit;
  std::string usage;
  std::string droppable;  // field of memory.stat
};

const CgroupFiles kVersion2{{"::", "/sys/fs/cgroup"}, "memory.max", "memory.current", "inactive_file"};
const CgroupFiles kVersion1{
    {":memory:", "/sys/fs/cgroup/memory"}, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};

void apply_cgroup(const std::string& root, const CgroupFiles& files, AvailableMemory& available) {
  for_each_group(root, files.group, [&](const std::string& folder) {
    const std::optional<int64_t> limit = read_leading_number(folder + files.limit);
    const std::optional<int64_t> usage = read_leading_number(folder + files.usage);
    if (!limit || !usage) return;
    const int64_t droppable = read_field(folder + "memory.stat", files.droppable).value_or(0);
    const int64_t left = std::max<int64_t>(0, *limit - (*usage - droppable));
    if (left < available.bytes) available = {left, folder + files.limit};
  });
}

}  // namespace

AvailableMemory available_memory(const std::string& root) {
  AvailableMemory available{std::numeric_limits<int64_t>::max(), "nothing"};
  if (const std::optional<int64_t> kib = read_field(root + "/proc/meminfo", "MemAvailable:")) {
    available = {*kib * 1024, "MemAvailable"};
  }
  for (const CgroupFiles* files : {&kVersion2, &kVersion1}) apply_cgroup(root, *files, available);
  return available;
}

}  // namespace tandem
