// What all backends whose device is the host itself have in common: memory, streams and copies. Their operations run
// to the end inside the call, so a stream is always idle when its owner looks.
#pragma once

#include "src/kernels/ops.h"

namespace tandem::kernels {

class HostOps : public Ops {
 public:
  DType activation_dtype() const override { return DType::kF32; }
  std::unique_ptr<Buffer> allocate(int64_t bytes) override;  // aligned to 64 bytes
  // A memfd; private memory if the kernel gives none.
  std::unique_ptr<Buffer> allocate_shareable(int64_t bytes) override;
  Result<std::unique_ptr<Buffer>> open_shared(int64_t process, int descriptor, int64_t bytes) override;
  std::unique_ptr<Stream> make_stream() override;
  void upload(Stream& stream, std::byte* device_address, std::span<const std::byte> host) override;
  void read_back(Stream& stream, const std::byte* device_address, std::span<std::byte> host) override;
  void synchronize(Stream& stream) override;
};

// Zeroed host memory, aligned to 64 bytes; large ones ask the kernel for huge pages.
class HostBuffer final : public Buffer {
 public:
  explicit HostBuffer(int64_t bytes);
  ~HostBuffer() override;
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;
  std::byte* address() const override { return address_; }
  int64_t bytes() const override { return bytes_; }
  Status populate(int64_t offset, int64_t bytes) override;

 private:
  std::byte* address_ = nullptr;
  int64_t bytes_ = 0;
  int64_t mapped_bytes_ = 0;  // 0 when the memory came from the allocator
};

// The same in a memfd: it has no name in any file system and ends with the last process that maps it.
class SharedHostBuffer final : public Buffer {
 public:
  ~SharedHostBuffer() override;
  SharedHostBuffer(const SharedHostBuffer&) = delete;
  SharedHostBuffer& operator=(const SharedHostBuffer&) = delete;
  // Null if the kernel refuses; errno says why.
  static std::unique_ptr<SharedHostBuffer> create(int64_t bytes);
  // As Ops::open_shared; whoever opens it has no descriptor of it.
  static Result<std::unique_ptr<SharedHostBuffer>> open(int64_t process, int descriptor, int64_t bytes);
  std::byte* address() const override { return address_; }
  int64_t bytes() const override { return bytes_; }
  int shared_fd() const override { return fd_; }
  Status populate(int64_t offset, int64_t bytes) override;

 private:
  explicit SharedHostBuffer(int64_t bytes);
  bool map(int fd);

  std::byte* address_ = nullptr;
  int64_t bytes_ = 0;
  int64_t mapped_bytes_ = 0;
  int fd_ = -1;
};

}  // namespace tandem::kernels
