// Reader of the safetensors format (reference: github.com/huggingface/safetensors, "Format"): 8 bytes little-endian
// header length N, N bytes of JSON, then the tensors' bytes without gaps. Files come from strangers, so every field of
// the header is checked before any tensor can be looked at.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/result.h"
#include "src/kernels/tensor.h"
#include "src/model/mapped_file.h"

namespace tandem::model {

constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;
constexpr size_t kMaxTensorRank = 8;

// One tensor of a file. Its bytes may lie at any alignment.
struct StoredTensor {
  std::string name;
  std::string_view dtype;                      // as in the file, "BF16"
  std::optional<kernels::DType> kernel_dtype;  // if it is one that the operation table knows
  std::vector<int64_t> shape;
  std::span<const std::byte> data;
  const MappedFile* file = nullptr;

  int64_t elements() const;
};

// "[7168, 16384]"
std::string shape_text(std::span<const int64_t> shape);

// The tensors of a whole file image in the order of their bytes. `path` is for messages.
Result<std::vector<StoredTensor>> parse_safetensors(std::span<const std::byte> image, const std::string& path);

}  // namespace tandem::model
