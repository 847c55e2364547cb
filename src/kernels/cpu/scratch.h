// Memory that a stream's operations use and forget. It grows to the largest need and stays.
#pragma once

#include <cstdint>
#include <memory>

#include "src/kernels/host_ops.h"

namespace tandem::kernels::cpu {

// One piece of memory, aligned to 64 bytes. `get` invalidates what it gave before.
class Scratch {
 public:
  template <typename T>
  T* get(int64_t count) {
    const int64_t bytes = count * int64_t{sizeof(T)};
    if (buffer_ == nullptr || buffer_->bytes() < bytes) {
      buffer_.reset();  // before the new one, so that both are never held
      buffer_ = std::make_unique<HostBuffer>(bytes);
    }
    return reinterpret_cast<T*>(buffer_->address());
  }

 private:
  std::unique_ptr<HostBuffer> buffer_;
};

class CpuStream final : public Stream {
 public:
  Scratch rows;      // activations between the parts of one operation
  Scratch narrow;    // x rounded to the weight's format
  Scratch hidden;    // the same of the experts' hidden activations
  Scratch workers;   // a piece per thread
  Scratch partials;  // results of attention splits
};

}  // namespace tandem::kernels::cpu
