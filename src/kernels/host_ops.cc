#include "src/kernels/host_ops.h"

#include <fcntl.h>
#include <sys/mman.h>
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

std::unique_ptr<SharedHostBuffer> SharedHostBuffer::create(int64_t bytes) {
  CHECK_GE(bytes, 0);
  std::unique_ptr<SharedHostBuffer> buffer(new SharedHostBuffer());
  buffer->bytes_ = bytes;
  buffer->fd_ = ::memfd_create("tandem-buffer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (buffer->fd_ < 0) return nullptr;
  const int64_t size = round_up(bytes == 0 ? 1 : bytes, bytes < kMapThreshold ? ::sysconf(_SC_PAGESIZE) : kHugePage);
  // Sealed, so that who maps it can rely on its size.
  if (::ftruncate(buffer->fd_, size) != 0 ||
      ::fcntl(buffer->fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return nullptr;
  }
  void* memory = ::mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_SHARED, buffer->fd_, 0);
  if (memory == MAP_FAILED) return nullptr;
  buffer->address_ = static_cast<std::byte*>(memory);
  buffer->mapped_bytes_ = size;
  ::madvise(memory, static_cast<size_t>(size), MADV_HUGEPAGE);  // an optimisation: refusal is harmless
  cpu::Topology::of_this_machine().interleave(buffer->address_, size);
  return buffer;
}

SharedHostBuffer::~SharedHostBuffer() {
  if (address_ != nullptr) ::munmap(address_, static_cast<size_t>(mapped_bytes_));
  if (fd_ >= 0) ::close(fd_);
}

std::unique_ptr<Buffer> HostOps::allocate_shareable(int64_t bytes) {
  std::unique_ptr<Buffer> shared = SharedHostBuffer::create(bytes);
  return shared != nullptr ? std::move(shared) : allocate(bytes);
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
