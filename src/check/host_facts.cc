#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "src/base/control_group.h"
#include "src/base/hash.h"
#include "src/base/memory_info.h"
#include "src/base/version.h"
#include "src/check/facts.h"

namespace tandem::check {
namespace {

std::string first_line(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string hash_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  Sha256 hash;
  std::vector<char> piece(1 << 20);
  while (file.read(piece.data(), std::ssize(piece)) || file.gcount() > 0) {
    hash.add(std::string_view(piece.data(), static_cast<size_t>(file.gcount())));
  }
  return hash.finish().hex();
}

// "always [madvise] never" has its choice in brackets.
std::string chosen_word(const std::string& line) {
  const size_t begin = line.find('[');
  const size_t end = line.find(']');
  return begin == std::string::npos || end == std::string::npos ? "" : line.substr(begin + 1, end - begin - 1);
}

std::string try_memfd() {
  const int fd = ::memfd_create("tandem-check", MFD_CLOEXEC);
  if (fd < 0) return std::strerror(errno);
  const bool sized = ::ftruncate(fd, 4096) == 0;
  const std::string fault = sized ? "" : std::strerror(errno);
  ::close(fd);
  return fault;
}

int64_t free_shared_memory() {
  struct statvfs info {};
  if (::statvfs("/dev/shm", &info) != 0 || ::access("/dev/shm", W_OK) != 0) return -1;
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

std::vector<RdmaPort> list_rdma_ports(const std::string& root) {
  namespace fs = std::filesystem;
  std::vector<RdmaPort> ports;
  std::error_code ignored;
  for (const fs::directory_entry& device : fs::directory_iterator(root + "/sys/class/infiniband", ignored)) {
    for (const fs::directory_entry& port : fs::directory_iterator(device.path() / "ports", ignored)) {
      ports.push_back({device.path().filename().string() + "/" + port.path().filename().string(),
                       first_line(port.path() / "state")});
    }
  }
  std::sort(ports.begin(), ports.end(), [](const RdmaPort& a, const RdmaPort& b) { return a.name < b.name; });
  return ports;
}

int64_t count_processors() {
  cpu_set_t mask;
  return ::sched_getaffinity(0, sizeof mask, &mask) == 0 ? CPU_COUNT(&mask) : ::sysconf(_SC_NPROCESSORS_ONLN);
}

}  // namespace

HostFacts read_host_facts(const std::string& root) {
  HostFacts facts;
  facts.version = kVersion;
  facts.program_sha256 = hash_file("/proc/self/exe");
  std::error_code ignored;
  facts.folder = std::filesystem::current_path(ignored).string();
  rlimit limit{};
  if (::getrlimit(RLIMIT_MEMLOCK, &limit) == 0) {
    facts.locked_memory_bytes = limit.rlim_cur == RLIM_INFINITY ? -1 : static_cast<int64_t>(limit.rlim_cur);
  }
  facts.shm_free_bytes = free_shared_memory();
  facts.memfd_fault = try_memfd();
  facts.transparent_huge_pages = chosen_word(first_line(root + "/sys/kernel/mm/transparent_hugepage/enabled"));
  facts.huge_pages = read_leading_number(root + "/proc/sys/vm/nr_hugepages").value_or(0);
  facts.rdma_ports = list_rdma_ports(root);
  facts.processors = count_processors();
  const double quota = processor_quota(root);
  facts.quota = std::isinf(quota) ? -1 : quota;
  const AvailableMemory memory = available_memory(root);
  facts.available_bytes = memory.bytes;
  facts.available_by = memory.limited_by;
  return facts;
}

}  // namespace tandem::check
