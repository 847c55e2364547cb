// One integer matrix of a checkpoint, whatever the layout of its tensors, as rows of a HostMatrix.
//
// Per module, with n outputs, k inputs and G groups of columns per row:
//  kBytes        weight I8 [n, k], weight_scale [n, G] or [1]; with zero points weight_zero_point I8 likewise
//  kAscendBytes  weight I8 [n, k], weight_scale [n, 1], weight_offset [n, 1], which must be 0
//  kWords        weight_packed I32 [n, ceil(k / e)], e = 32 / bits codes per word, lowest bits first, codes plus half
//                their range; weight_scale [n, G]; weight_shape I64 [2]; with zero points weight_zero_point I32
//                [ceil(n / e), G], packed along n, plus half the range too
//  kAwq          qweight I32 [k, n / 8], qzeros I32 [G, n / 8], scales [G, n]; nibble i of a word is output
//                0, 2, 4, 6, 1, 3, 5, 7 of its eight
//  kGptq         qweight I32 [k / e, n], qzeros I32 [G, n / e], scales [G, n], g_idx I32 [k]; zeros less one in v1
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "src/kernels/integer.h"
#include "src/model/checkpoint.h"
#include "src/model/integer_rows.h"
#include "src/model/quant_config.h"

namespace tandem::model {

class StoredIntegers {
 public:
  // Finds the tensors of `module` and checks their types and shapes; the fault names file, tensor and remedy.
  static Result<StoredIntegers> find(const Checkpoint& checkpoint, const QuantConfig& quant, const QuantScheme& scheme,
                                     std::string_view module, int64_t n, int64_t k);

  const QuantScheme& scheme() const { return *scheme_; }
  // Whether rows have zeros of their own.
  bool has_zeros() const { return zeros_ != nullptr; }
  // Scales must be finite, zero points in range, columns in order.
  Status check_values() const;

  // Rows [first, first + count), `first` a multiple of 8. 8-bit codes come out as kI8; if they have zero points,
  // `zeros` hold int8 too.
  void read_rows(int64_t first, int64_t count, const IntegerRows& out) const;
  // The same as floats [count, k].
  void decode_rows(int64_t first, int64_t count, float* out) const;

 private:
  StoredIntegers() = default;
  Status find_transposed(const Checkpoint& checkpoint, const std::string& module);
  Status find_in_rows(const Checkpoint& checkpoint, const std::string& module);
  Status check_zeros() const;
  Status check_group_index() const;
  float scale_at(int64_t row, int64_t group) const;
  int32_t zero_at(int64_t row, int64_t group) const;  // as it counts: 0 … 15, or -128 … 127
  void read_words(int64_t first, int64_t count, const IntegerRows& out) const;
  void read_awq(int64_t first, int64_t count, const IntegerRows& out) const;
  void read_gptq(int64_t first, int64_t count, const IntegerRows& out) const;
  bool is_transposed() const { return scheme_->layout == QuantLayout::kAwq || scheme_->layout == QuantLayout::kGptq; }
  int64_t columns() const { return kernels::group_columns(k_, scheme_->format()); }  // of a group
  int64_t per_word() const { return 32 / scheme_->bits; }

  const QuantScheme* scheme_ = nullptr;
  int64_t n_ = 0;
  int64_t k_ = 0;
  int64_t groups_ = 0;
  const StoredTensor* codes_ = nullptr;
  const StoredTensor* scales_ = nullptr;
  const StoredTensor* zeros_ = nullptr;        // null: the middle
  const StoredTensor* offsets_ = nullptr;      // kAscendBytes
  const StoredTensor* group_index_ = nullptr;  // kGptq
};

// Names of all tensors that a module's weight may consist of, behind the module's name.
std::span<const std::string_view> weight_suffixes();

// "<file>: tensor "<name>" …".
template <typename... Args>
Error tensor_fault(const StoredTensor& tensor, fmt::format_string<Args...> format, Args&&... args) {
  return make_error(ErrorKind::kInvalidArgument, "{}: tensor \"{}\" {}", tensor.file->path(), printable(tensor.name),
                    fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace tandem::model
