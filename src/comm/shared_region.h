// Memory that processes of one host share. It has no name in any file system: the creator holds a descriptor, others
// open it through /proc, so nothing is left behind however a process dies, and memory lives as long as someone maps it.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "src/base/result.h"

namespace tandem::comm {

// How another process of this host, of the same user and pid namespace, opens a region.
struct RegionAddress {
  pid_t pid = 0;
  int fd = -1;
  int64_t bytes = 0;
};

class SharedRegion {
 public:
  enum class Access : uint8_t { kRead, kReadWrite };

  SharedRegion() = default;
  // Zeroed, of at least one byte; rounded up to pages. `name` is for /proc/PID/maps only.
  static Result<SharedRegion> create(const std::string& name, int64_t bytes);
  static Result<SharedRegion> open(const RegionAddress& address, Access access);
  ~SharedRegion();
  SharedRegion(SharedRegion&& other) noexcept;
  SharedRegion& operator=(SharedRegion&& other) noexcept;

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  std::span<std::byte> span() const { return {data_, static_cast<size_t>(bytes_)}; }
  // Of a region that this process has created.
  RegionAddress address() const;

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  int fd_ = -1;  // of the creator
};

}  // namespace tandem::comm
