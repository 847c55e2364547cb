// A tensor that owns its memory.
#pragma once

#include <memory>
#include <span>

#include "src/kernels/ops.h"

namespace tandem::model {

class DeviceTensor {
 public:
  DeviceTensor() = default;
  DeviceTensor(kernels::Ops& ops, kernels::DType dtype, int64_t rows, int64_t cols)
      : buffer_(ops.allocate(rows * cols * kernels::dtype_bytes(dtype))),
        view_{buffer_->address(), dtype, rows, cols, cols} {}

  const kernels::Tensor& all() const { return view_; }
  // The first `count` rows.
  kernels::Tensor rows(int64_t count) const { return view_.row_slice(0, count); }
  int64_t bytes() const { return buffer_ == nullptr ? 0 : buffer_->bytes(); }

  // Enqueues a copy of `host` to the first rows and returns them. `host` must live until the stream is synchronised.
  template <typename T>
  kernels::Tensor upload(kernels::Ops& ops, kernels::Stream& stream, std::span<const T> host) const {
    CHECK_EQ(static_cast<int64_t>(sizeof(T)), kernels::dtype_bytes(view_.dtype));
    CHECK_EQ(static_cast<int64_t>(host.size()) % view_.cols, 0);
    CHECK_LE(static_cast<int64_t>(host.size()), view_.rows * view_.cols);
    ops.upload(stream, view_.address, std::as_bytes(host));
    return rows(static_cast<int64_t>(host.size()) / view_.cols);
  }

 private:
  std::unique_ptr<kernels::Buffer> buffer_;
  kernels::Tensor view_;
};

}  // namespace tandem::model
