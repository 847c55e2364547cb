// Weights in panels of kPanelWidth outputs, as isa.h describes them: what a microkernel reads is contiguous, and every
// instruction set reads the same layout. Outputs and odd k are filled up with zeros.
#pragma once

#include <span>
#include <utility>
#include <vector>

#include "src/kernels/cpu/isa.h"
#include "src/kernels/cpu/thread_pool.h"
#include "src/kernels/host_ops.h"

namespace tandem::kernels::cpu {

// What an integer format alone says of the layout: all of it that concerns rows.
IntegerLayout row_layout(const WeightFormat& format, int64_t k);

class PackedWeight final : public Weight {
 public:
  PackedWeight(std::span<const HostMatrix> matrices, const WeightFormat& format, ThreadPool& pool);

  int64_t batch() const override { return batch_; }
  int64_t n() const override { return n_; }
  int64_t k() const override { return k_; }
  WeightFormat format() const override { return format_; }
  int64_t bytes() const override { return buffer_.bytes(); }
  DType scale_dtype() const override { return integers_.f16_scales ? DType::kF16 : DType::kF32; }

  // For integer formats.
  const IntegerLayout& integers() const { return integers_; }
  int64_t panels() const { return (n_ + kPanelWidth - 1) / kPanelWidth; }
  int64_t panel_bytes() const;
  const std::byte* panel(int64_t matrix, int64_t index) const {
    return matrices_[static_cast<size_t>(matrix)] + index * panel_bytes();
  }
  int64_t matrix_bytes() const override { return panels() * panel_bytes(); }
  std::byte* matrix(int64_t index) override { return matrices_[static_cast<size_t>(index)]; }
  std::byte* replace_matrix(int64_t index, std::byte* memory) override {
    return std::exchange(matrices_[static_cast<size_t>(index)], memory);
  }
  // Row n of the matrix as it was before packing, in f32.
  void unpack_row(int64_t matrix, int64_t n, float* out) const;

 private:
  void pack_panel(const HostMatrix& matrix, int64_t index, std::byte* panel) const;
  void pack_integer_panel(const HostMatrix& matrix, int64_t index, std::byte* panel) const;

  int64_t batch_;
  int64_t n_;
  int64_t k_;
  WeightFormat format_;
  IntegerLayout integers_;
  HostBuffer buffer_;
  std::vector<std::byte*> matrices_;  // where each lies: in buffer_ until it is replaced
};

// The PackedWeight behind `weight`; CHECKs that a cpu backend packed it.
const PackedWeight& packed_weight(const Weight& weight);

}  // namespace tandem::kernels::cpu
