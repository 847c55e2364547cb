#include "src/comm/shared_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace tandem::comm {

Result<SharedRegion> SharedRegion::create(const std::string& name, int64_t bytes) {
  CHECK_GE(bytes, 1);
  SharedRegion region;
  region.fd_ = ::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (region.fd_ < 0) {
    return make_error(ErrorKind::kUnavailable, "shared memory \"{}\": {}; the kernel must allow memfd_create", name,
                      std::strerror(errno));
  }
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  region.bytes_ = (bytes + page - 1) / page * page;
  // Sealed, so that no peer can shrink it under our feet.
  if (::ftruncate(region.fd_, region.bytes_) != 0 ||
      ::fcntl(region.fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return make_error(ErrorKind::kUnavailable, "shared memory \"{}\" of {} bytes: {}; free memory", name,
                      region.bytes_, std::strerror(errno));
  }
  void* const data = ::mmap(nullptr, static_cast<size_t>(region.bytes_), PROT_READ | PROT_WRITE, MAP_SHARED,
                            region.fd_, 0);
  if (data == MAP_FAILED) {
    return make_error(ErrorKind::kUnavailable, "shared memory \"{}\" of {} bytes: {}; free memory", name,
                      region.bytes_, std::strerror(errno));
  }
  region.data_ = static_cast<std::byte*>(data);
  return region;
}

Result<SharedRegion> SharedRegion::open(const RegionAddress& address, Access access) {
  const std::string path = fmt::format("/proc/{}/fd/{}", address.pid, address.fd);
  const int fd = ::open(path.c_str(), (access == Access::kRead ? O_RDONLY : O_RDWR) | O_CLOEXEC);
  if (fd < 0) {
    return make_error(ErrorKind::kUnavailable,
                      "shared memory of process {}: {}; both processes must run as the same user, in the same container",
                      address.pid, std::strerror(errno));
  }
  struct stat facts {};
  const int seals = ::fcntl(fd, F_GET_SEALS);
  const bool is_region = ::fstat(fd, &facts) == 0 && facts.st_size == address.bytes && seals >= 0 &&
                         (seals & F_SEAL_SHRINK) != 0;
  if (!is_region) {
    ::close(fd);
    return make_error(ErrorKind::kUnavailable, "shared memory of process {}: {} is not its region of {} bytes",
                      address.pid, path, address.bytes);
  }
  const int protection = access == Access::kRead ? PROT_READ : PROT_READ | PROT_WRITE;
  void* const data = ::mmap(nullptr, static_cast<size_t>(address.bytes), protection, MAP_SHARED, fd, 0);
  const int fault = errno;
  ::close(fd);  // the mapping stays
  if (data == MAP_FAILED) {
    return make_error(ErrorKind::kUnavailable, "shared memory of process {}, {} bytes: {}", address.pid, address.bytes,
                      std::strerror(fault));
  }
  SharedRegion region;
  region.data_ = static_cast<std::byte*>(data);
  region.bytes_ = address.bytes;
  return region;
}

SharedRegion::~SharedRegion() {
  if (data_ != nullptr) ::munmap(data_, static_cast<size_t>(bytes_));
  if (fd_ >= 0) ::close(fd_);
}

SharedRegion::SharedRegion(SharedRegion&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      fd_(std::exchange(other.fd_, -1)) {}

SharedRegion& SharedRegion::operator=(SharedRegion&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(fd_, other.fd_);
  return *this;
}

RegionAddress SharedRegion::address() const {
  CHECK_GE(fd_, 0);
  return {::getpid(), fd_, bytes_};
}

}  // namespace tandem::comm
