#include "src/kernels/host_ops.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "src/base/check.h"
#include "src/kernels/cpu/topology.h"

namespace tandem::kernels {
namespace {

constexpr int64_t kAlignment = 64;                   // a cache line, and the widest vector
constexpr int64_t kMapThreshold = int64_t{4} << 20;  // from two huge pages on
constexpr int64_t kHugePage = int64_t{2} << 20;

class HostStream final : public Stream {};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Of a mapping of whole pages.
Status populate_pages(std::byte* mapping, int64_t mapped_bytes, int64_t offset, int64_t bytes) {
  CHECK_GE(offset, 0);
  CHECK_GE(bytes, 0);
  CHECK_LE(offset + bytes, mapped_bytes);
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  const int64_t first = offset / page * page;
  const size_t size = static_cast<size_t>(round_up(offset + bytes - first, page));
  while (::madvise(mapping + first, size, MADV_POPULATE_WRITE) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    return make_error(ErrorKind::kUnsupported, "pages of memory cannot be made present ahead of use: {}{}",
                      std::strerror(errno), errno == EINVAL ? "; Linux 5.14 or newer can" : "");
  }
  return {};
}

}  // namespace

HostBuffer::HostBuffer(int64_t bytes) : bytes_(bytes) {
  CHECK_GE(bytes, 0);
  if (bytes < kMapThreshold) {
    const size_t size = static_cast<size_t>(round_up(bytes == 0 ? 1 : bytes, kAlignment));
    address_ = static_cast<std::byte*>(std::aligned_alloc(kAlignment, size));
    CHECK(address_ != nullptr);
    std::memset(address_, 0, size);
    return;
  }
  mapped_bytes_ = round_up(bytes, kHugePage);
  const size_t size = static_cast<size_t>(mapped_bytes_);
  void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail_check(__FILE__, __LINE__, fmt::format("out of memory: {} bytes asked", bytes));
  ::madvise(memory, size, MADV_HUGEPAGE);  // an optimisation: refusal is harmless
  address_ = static_cast<std::byte*>(memory);
  cpu::Topology::of_this_machine().interleave(address_, mapped_bytes_);
}

HostBuffer::~HostBuffer() {
  if (mapped_bytes_ > 0) {
    ::munmap(address_, static_cast<size_t>(mapped_bytes_));
  } else {
    std::free(address_);
  }
}

Status HostBuffer::populate(int64_t offset, int64_t bytes) {
  if (mapped_bytes_ == 0) return {};
  return populate_pages(address_, mapped_bytes_, offset, bytes);
}

Status SharedHostBuffer::populate(int64_t offset, int64_t bytes) {
  return populate_pages(address_, mapped_bytes_, offset, bytes);
}

SharedHostBuffer::SharedHostBuffer(int64_t bytes) : bytes_(bytes) {
  CHECK_GE(bytes, 0);
  mapped_bytes_ = round_up(bytes == 0 ? 1 : bytes, bytes < kMapThreshold ? ::sysconf(_SC_PAGESIZE) : kHugePage);
}

bool SharedHostBuffer::map(int fd) {
  void* memory = ::mmap(nullptr, static_cast<size_t>(mapped_bytes_), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return false;
  address_ = static_cast<std::byte*>(memory);
  ::madvise(memory, static_cast<size_t>(mapped_bytes_), MADV_HUGEPAGE);  // an optimisation: refusal is harmless
  return true;
}

std::unique_ptr<SharedHostBuffer> SharedHostBuffer::create(int64_t bytes) {
  std::unique_ptr<SharedHostBuffer> buffer(new SharedHostBuffer(bytes));
  buffer->fd_ = ::memfd_create("tandem-buffer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (buffer->fd_ < 0) return nullptr;
  // Sealed, so that who maps it can rely on its size.
  if (::ftruncate(buffer->fd_, buffer->mapped_bytes_) != 0 ||
      ::fcntl(buffer->fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0 || !buffer->map(buffer->fd_)) {
    return nullptr;
  }
  cpu::Topology::of_this_machine().interleave(buffer->address_, buffer->mapped_bytes_);
  return buffer;
}

Result<std::unique_ptr<SharedHostBuffer>> SharedHostBuffer::open(int64_t process, int descriptor, int64_t bytes) {
  const std::string path = fmt::format("/proc/{}/fd/{}", process, descriptor);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) {
    return make_error(ErrorKind::kUnavailable,
                      "shared memory {}: {}; both processes must run as the same user, in the same container", path,
                      std::strerror(errno));
  }
  std::unique_ptr<SharedHostBuffer> buffer(new SharedHostBuffer(bytes));
  struct stat facts {};
  const int seals = ::fcntl(fd, F_GET_SEALS);
  const bool is_known = ::fstat(fd, &facts) == 0 && seals >= 0;
  if (!is_known || facts.st_size != buffer->mapped_bytes_ || (seals & F_SEAL_SHRINK) == 0) {
    ::close(fd);
    return make_error(ErrorKind::kUnavailable,
                      "shared memory {} has {} bytes{} instead of {} sealed ones; all ranks must be given the same "
                      "number of KV blocks",
                      path, is_known ? int64_t{facts.st_size} : 0, seals < 0 ? ", no seals" : "", buffer->mapped_bytes_);
  }
  const bool is_mapped = buffer->map(fd);
  const int fault = errno;
  ::close(fd);  // the mapping stays
  if (is_mapped) return buffer;
  return make_error(ErrorKind::kUnavailable, "shared memory {} of {} bytes: {}; free memory", path, bytes,
                    std::strerror(fault));
}

SharedHostBuffer::~SharedHostBuffer() {
  if (address_ != nullptr) ::munmap(address_, static_cast<size_t>(mapped_bytes_));
  if (fd_ >= 0) ::close(fd_);
}

std::unique_ptr<Buffer> HostOps::allocate_shareable(int64_t bytes) {
  std::unique_ptr<Buffer> shared = SharedHostBuffer::create(bytes);
  return shared != nullptr ? std::move(shared) : allocate(bytes);
}

Result<std::unique_ptr<Buffer>> HostOps::open_shared(int64_t process, int descriptor, int64_t bytes) {
  TANDEM_ASSIGN(std::unique_ptr<SharedHostBuffer> shared, SharedHostBuffer::open(process, descriptor, bytes));
  return std::unique_ptr<Buffer>(std::move(shared));
}

std::unique_ptr<Buffer> HostOps::allocate(int64_t bytes) { return std::make_unique<HostBuffer>(bytes); }

std::unique_ptr<Stream> HostOps::make_stream() { return std::make_unique<HostStream>(); }

void HostOps::upload(Stream& /*stream*/, std::byte* device_address, std::span<const std::byte> host) {
  if (!host.empty()) std::memcpy(device_address, host.data(), host.size());
}

void HostOps::read_back(Stream& /*stream*/, const std::byte* device_address, std::span<std::byte> host) {
  if (!host.empty()) std::memcpy(host.data(), device_address, host.size());
}

void HostOps::synchronize(Stream& /*stream*/) {}

}  // namespace tandem::kernels
