#include "src/model/stored_integers.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "src/kernels/host_matrix.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::HostMatrix;

constexpr std::string_view kWeightSuffixes[] = {".weight",
                                                ".weight_packed",
                                                ".qweight",
                                                ".weight_scale",
                                                ".weight_scale_inv",
                                                ".weight_zero_point",
                                                ".weight_shape",
                                                ".weight_offset",
                                                ".scales",
                                                ".qzeros",
                                                ".g_idx"};

// Where nibble j of an AWQ word stands: the inverse of 0, 2, 4, 6, 1, 3, 5, 7.
constexpr std::array<uint32_t, 8> kAwqNibble{0, 4, 1, 5, 2, 6, 3, 7};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

uint32_t load_word(const StoredTensor& tensor, int64_t index) {
  uint32_t word = 0;
  std::memcpy(&word, tensor.data.data() + index * 4, sizeof word);
  return word;
}

float load_number(const StoredTensor& tensor, int64_t index) {
  HostMatrix matrix;
  matrix.scales = tensor.data.data();
  matrix.scales_dtype = *tensor.kernel_dtype;
  return kernels::load_scale(matrix, index);
}

Status expect_dtype(const StoredTensor& tensor, std::string_view dtype) {
  if (tensor.dtype == dtype) return {};
  return tensor_fault(tensor, "has dtype {}, must be {}; fetch the file again", tensor.dtype, dtype);
}

Status expect_float(const StoredTensor& tensor) {
  if (tensor.dtype == "F32" || tensor.dtype == "BF16" || tensor.dtype == "F16") return {};
  return tensor_fault(tensor, "has dtype {}, must be F32, BF16 or F16; use a release with such scales", tensor.dtype);
}

// The tensor, of that type and of one of the shapes; the first is the usual one.
Result<const StoredTensor*> require(const Checkpoint& checkpoint, const std::string& name, std::string_view dtype,
                                    std::initializer_list<std::vector<int64_t>> shapes) {
  const StoredTensor* tensor = checkpoint.find(name);
  for (const std::vector<int64_t>& shape : shapes) {
    if (tensor != nullptr && tensor->shape == shape) {
      TANDEM_TRY(dtype.empty() ? expect_float(*tensor) : expect_dtype(*tensor, dtype));
      return tensor;
    }
  }
  return checkpoint.require(name, *shapes.begin());  // the fault
}

}  // namespace

std::span<const std::string_view> weight_suffixes() { return kWeightSuffixes; }

Result<StoredIntegers> StoredIntegers::find(const Checkpoint& checkpoint, const QuantConfig& quant,
                                            const QuantScheme& scheme, std::string_view module, int64_t n, int64_t k) {
  StoredIntegers found;
  found.scheme_ = &scheme;
  found.n_ = n;
  found.k_ = k;
  const int64_t columns = scheme.group_size == 0 ? k : scheme.group_size;
  if (k % columns != 0 && !quant.allows_ragged_groups) {
    return make_error(ErrorKind::kInvalidArgument,
                      "{}: the group size {} does not divide the {} columns of {}; use a release with another group "
                      "size, or quantise the bf16 release with --quantization",
                      quant.path, columns, k, printable(module));
  }
  found.groups_ = ceil_div(k, columns);
  const std::string name(module);
  TANDEM_TRY(found.is_transposed() ? found.find_transposed(checkpoint, name) : found.find_in_rows(checkpoint, name));
  return found;
}

Status StoredIntegers::find_transposed(const Checkpoint& checkpoint, const std::string& module) {
  const bool is_awq = scheme_->layout == QuantLayout::kAwq;
  const int64_t outputs_per_word = per_word();
  const StoredTensor* codes = checkpoint.find(module + ".qweight");
  if (codes != nullptr && (n_ % outputs_per_word != 0 || (!is_awq && k_ % per_word() != 0))) {
    return tensor_fault(*codes, "is packed in words of {}, but the matrix is [{}, {}]; use an unquantised release",
                        per_word(), n_, k_);
  }
  const std::vector<int64_t> shape =
      is_awq ? std::vector<int64_t>{k_, n_ / 8} : std::vector<int64_t>{k_ / per_word(), n_};
  TANDEM_ASSIGN(codes_, require(checkpoint, module + ".qweight", "I32", {shape}));
  TANDEM_ASSIGN(scales_, require(checkpoint, module + ".scales", "", {{groups_, n_}}));
  TANDEM_ASSIGN(zeros_, require(checkpoint, module + ".qzeros", "I32", {{groups_, n_ / outputs_per_word}}));
  if (is_awq || checkpoint.find(module + ".g_idx") == nullptr) return {};
  TANDEM_ASSIGN(group_index_, require(checkpoint, module + ".g_idx", "I32", {{k_}}));
  return {};
}

Status StoredIntegers::find_in_rows(const Checkpoint& checkpoint, const std::string& module) {
  const bool is_packed = scheme_->layout == QuantLayout::kWords;
  if (is_packed) {
    TANDEM_ASSIGN(codes_, require(checkpoint, module + ".weight_packed", "I32", {{n_, ceil_div(k_, per_word())}}));
  } else {
    TANDEM_ASSIGN(codes_, require(checkpoint, module + ".weight", "I8", {{n_, k_}}));
  }
  if (groups_ == 1) {
    TANDEM_ASSIGN(scales_, require(checkpoint, module + ".weight_scale", "", {{n_, 1}, {n_}, {1}, {}}));
  } else {
    TANDEM_ASSIGN(scales_, require(checkpoint, module + ".weight_scale", "", {{n_, groups_}}));
  }
  if (const StoredTensor* shape = checkpoint.find(module + ".weight_shape"); is_packed && shape != nullptr) {
    const int64_t wanted[] = {n_, k_};
    TANDEM_TRY(expect_dtype(*shape, "I64"));
    if (shape->data.size() != sizeof wanted || std::memcmp(shape->data.data(), wanted, sizeof wanted) != 0) {
      return tensor_fault(*shape, "must hold [{}, {}]; check that config.json belongs to these weights", n_, k_);
    }
  }
  if (scheme_->layout == QuantLayout::kAscendBytes) {
    if (checkpoint.find(module + ".weight_offset") == nullptr) return {};
    TANDEM_ASSIGN(offsets_, require(checkpoint, module + ".weight_offset", "", {{n_, 1}, {n_}}));
  }
  if (scheme_->is_symmetric) return {};
  if (is_packed) {
    TANDEM_ASSIGN(zeros_,
                  require(checkpoint, module + ".weight_zero_point", "I32", {{ceil_div(n_, per_word()), groups_}}));
  } else if (groups_ == 1) {
    TANDEM_ASSIGN(zeros_, require(checkpoint, module + ".weight_zero_point", "I8", {{n_, 1}, {n_}, {1}, {}}));
  } else {
    TANDEM_ASSIGN(zeros_, require(checkpoint, module + ".weight_zero_point", "I8", {{n_, groups_}}));
  }
  return {};
}

Status StoredIntegers::check_values() const {
  for (int64_t i = 0; i < scales_->elements(); ++i) {
    const float scale = load_number(*scales_, i);
    if (!std::isfinite(scale)) {
      return tensor_fault(*scales_, "holds {} at element {}, must be finite; fetch the file again", scale, i);
    }
    // Zero belongs to a group of zeros; our own quantiser writes it.
    if (scale < 0) {
      return tensor_fault(*scales_, "holds {} at element {}, a scale is not negative; fetch the file again", scale, i);
    }
  }
  if (offsets_ != nullptr) {
    for (int64_t i = 0; i < offsets_->elements(); ++i) {
      const float offset = load_number(*offsets_, i);
      if (offset != 0) {
        return tensor_fault(*offsets_, "holds {} at element {}, must be 0; use a release with symmetric weights",
                            offset, i);
      }
    }
  }
  TANDEM_TRY(check_zeros());
  return check_group_index();
}

Status StoredIntegers::check_zeros() const {
  if (scheme_->layout != QuantLayout::kGptq) return {};  // others hold every value that their bits can
  const int32_t most = scheme_->bits == 4 ? 15 : 127;
  const bool must_be_middle = scheme_->bits == 8 && scheme_->is_symmetric;
  for (int64_t group = 0; group < groups_; ++group) {
    for (int64_t row = 0; row < n_; ++row) {
      const int32_t zero = zero_at(row, group);
      if (zero > most) {
        return tensor_fault(*zeros_, "has a zero point of {} for output {}, must be at most {}; {}",
                            zero - (scheme_->bits == 8 ? -128 : 0), row, scheme_->bits == 4 ? 15 : 255,
                            "check checkpoint_format (gptq stores zero points less one, gptq_v2 as they are)");
      }
      if (must_be_middle && zero != 0) {
        return tensor_fault(*zeros_, "has a zero point of {} for output {}, must be 128 since sym is true; {}",
                            zero + 128, row, "check checkpoint_format");
      }
    }
  }
  return {};
}

Status StoredIntegers::check_group_index() const {
  if (group_index_ == nullptr) return {};
  for (int64_t k = 0; k < k_; ++k) {
    const int32_t group = static_cast<int32_t>(load_word(*group_index_, k));
    if (group == k / columns()) continue;
    return tensor_fault(*group_index_,
                        "puts column {} into group {}, must be {}: reordered columns (desc_act) are not "
                        "supported, use a release without",
                        k, group, k / columns());
  }
  return {};
}

float StoredIntegers::scale_at(int64_t row, int64_t group) const {
  if (is_transposed()) return load_number(*scales_, group * n_ + row);
  return load_number(*scales_, scales_->elements() == 1 ? 0 : row * groups_ + group);
}

int32_t StoredIntegers::zero_at(int64_t row, int64_t group) const {
  const int64_t bits = scheme_->bits;
  if (scheme_->layout == QuantLayout::kBytes) {
    const int64_t index = zeros_->elements() == 1 ? 0 : row * groups_ + group;
    return static_cast<int8_t>(zeros_->data[static_cast<size_t>(index)]);
  }
  const int64_t place = row % per_word();
  const int64_t line = row / per_word();
  const uint32_t word = load_word(*zeros_, is_transposed() ? group * (n_ / per_word()) + line : line * groups_ + group);
  const int64_t nibble = scheme_->layout == QuantLayout::kAwq ? kAwqNibble[static_cast<size_t>(place)] : place;
  const int32_t stored = static_cast<int32_t>(word >> (bits * nibble) & ((1U << bits) - 1));
  const bool is_less_one = scheme_->layout == QuantLayout::kGptq && scheme_->zeros_are_less_one;
  return stored + (is_less_one ? 1 : 0) - (bits == 8 ? 128 : 0);
}

void StoredIntegers::read_rows(int64_t first, int64_t count, const IntegerRows& out) const {
  CHECK_EQ(first % 8, 0);
  switch (scheme_->layout) {
    case QuantLayout::kBytes:
    case QuantLayout::kAscendBytes:
      std::memcpy(out.codes, codes_->data.data() + first * k_, static_cast<size_t>(count * k_));
      break;
    case QuantLayout::kWords:
      read_words(first, count, out);
      break;
    case QuantLayout::kAwq:
      read_awq(first, count, out);
      break;
    case QuantLayout::kGptq:
      read_gptq(first, count, out);
      break;
    case QuantLayout::kFloat8:
      fail_check(__FILE__, __LINE__, "no integers");
  }
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t group = 0; group < groups_; ++group) {
      out.scales[row * groups_ + group] = scale_at(first + row, group);
      if (out.zeros != nullptr) {
        out.zeros[row * groups_ + group] = std::byte(static_cast<uint8_t>(zero_at(first + row, group)));
      }
    }
  }
}

// The words of a row are its codes in order, two or four to ... eight per word, as kU4 has them.
void StoredIntegers::read_words(int64_t first, int64_t count, const IntegerRows& out) const {
  const int64_t row_bytes = ceil_div(k_, per_word()) * 4;
  for (int64_t row = 0; row < count; ++row) {
    const std::byte* source = codes_->data.data() + (first + row) * row_bytes;
    std::byte* target = out.codes + row * out.code_bytes;
    if (scheme_->bits == 4) {
      std::memcpy(target, source, static_cast<size_t>(out.code_bytes));
      if (k_ % 2 == 1) target[out.code_bytes - 1] &= std::byte{0x0F};
    } else {
      for (int64_t i = 0; i < k_; ++i) target[i] = source[i] ^ std::byte{0x80};
    }
  }
}

// Eight rows at a time: their nibbles share words, of which eight make one word of each row.
void StoredIntegers::read_awq(int64_t first, int64_t count, const IntegerRows& out) const {
  const int64_t words_per_line = n_ / 8;
  for (int64_t k = 0; k < k_; k += 8) {
    const int64_t lines = std::min<int64_t>(8, k_ - k);
    const int64_t bytes = std::min<int64_t>(4, out.code_bytes - k / 2);
    for (int64_t row = 0; row < count; row += 8) {
      std::array<uint32_t, 8> words{};
      for (int64_t i = 0; i < lines; ++i) {
        words[static_cast<size_t>(i)] = load_word(*codes_, (k + i) * words_per_line + (first + row) / 8);
      }
      for (int64_t j = 0; j < std::min<int64_t>(8, count - row); ++j) {
        const uint32_t shift = 4 * kAwqNibble[static_cast<size_t>(j)];
        uint32_t packed = 0;
        for (size_t i = 0; i < 8; ++i) packed |= (words[i] >> shift & 0x0FU) << (4 * i);
        std::memcpy(out.codes + (row + j) * out.code_bytes + k / 2, &packed, static_cast<size_t>(bytes));
      }
    }
  }
}

// A word is eight (or four) codes of one row, in order. Words of a row lie n apart: sixteen of them are a cache line of
// the result, read from sixteen lines that the next rows go on with.
void StoredIntegers::read_gptq(int64_t first, int64_t count, const IntegerRows& out) const {
  constexpr int64_t kLines = 16;
  const uint32_t flip = scheme_->bits == 8 ? 0x80808080U : 0U;
  const int64_t lines = k_ / per_word();
  for (int64_t line = 0; line < lines; line += kLines) {
    const int64_t end = std::min(lines, line + kLines);
    for (int64_t row = 0; row < count; ++row) {
      std::array<uint32_t, kLines> words;
      for (int64_t i = line; i < end; ++i) {
        words[static_cast<size_t>(i - line)] = load_word(*codes_, i * n_ + first + row) ^ flip;
      }
      std::memcpy(out.codes + row * out.code_bytes + line * 4, words.data(), static_cast<size_t>(end - line) * 4);
    }
  }
}

void StoredIntegers::decode_rows(int64_t first, int64_t count, float* out) const {
  kernels::WeightFormat format = scheme_->format();
  IntegerBuffer buffer;
  buffer.resize(count, k_, format, has_zeros());
  read_rows(first, count, buffer.rows());
  if (format.type == kernels::WeightType::kInt4 || !has_zeros()) {
    const HostMatrix matrix = buffer.matrices(count)[0];
    for (int64_t row = 0; row < count; ++row) kernels::decode_row(matrix, row, 0, k_, out + row * k_);
    return;
  }
  for (int64_t row = 0; row < count; ++row) {
    const IntegerRows source = buffer.rows().from(row);
    for (int64_t k = 0; k < k_; ++k) {
      const int32_t code = static_cast<int8_t>(source.codes[k]);
      const int32_t zero = static_cast<int8_t>(source.zeros[k / columns()]);
      out[row * k_ + k] = static_cast<float>(code - zero) * source.scales[k / columns()];
    }
  }
}

}  // namespace tandem::model
