#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_map>

#include "src/kernels/convert.h"
#include "src/kernels/host_matrix.h"
#include "src/model/sources.h"
#include "src/model/stored_integers.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::HostMatrix;
using kernels::WeightFormat;

// Bytes of each tensor that enter the fingerprint: enough that any other training of the same shape differs.
constexpr size_t kFingerprintSamples = 16;
constexpr size_t kFingerprintSampleBytes = 16;

constexpr std::string_view kWeight = ".weight";

bool is_plain_float(std::optional<DType> dtype) {
  return dtype == DType::kBf16 || dtype == DType::kF32 || dtype == DType::kF16;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string_view module_of(std::string_view tensor) {
  if (tensor.ends_with(kWeight)) tensor.remove_suffix(kWeight.size());
  return tensor;
}

std::vector<int64_t> shape_of(const MatrixRef& ref, int64_t n, int64_t k) {
  if (ref.slices == 0) return {n, k};
  return {ref.slices, n, k};
}

Status check_plain(const StoredTensor& tensor) {
  if (is_plain_float(tensor.kernel_dtype)) return {};
  return tensor_fault(tensor,
                      "has dtype {}, must be BF16, F16 or F32 (or F8_E4M3 for a matrix with scales); use a release "
                      "of the model in one of these",
                      tensor.dtype);
}

// Whether all weights that share scale [row, column] are zero, as where a quantiser has met a block of zeros.
bool is_zero_block(const HostMatrix& matrix, int64_t row, int64_t column) {
  const auto is_zero = [](std::byte code) { return (code & std::byte{0x7F}) == std::byte{0}; };
  const int64_t first = column * matrix.block_k;
  const int64_t count = std::min(matrix.block_k, matrix.k - first);
  for (int64_t n = row * matrix.block_n; n < std::min(matrix.n, (row + 1) * matrix.block_n); ++n) {
    const std::byte* const codes = matrix.data + n * matrix.k + first;
    if (!std::all_of(codes, codes + count, is_zero)) return false;
  }
  return true;
}

class CheckpointSource final : public WeightSource {
 public:
  CheckpointSource(std::unique_ptr<Checkpoint> checkpoint, const QuantConfig& quant)
      : checkpoint_(std::move(checkpoint)), quant_(quant) {}

  bool has(std::string_view tensor) const override { return checkpoint_->find(tensor) != nullptr; }

  Status check_matrix(const MatrixRef& ref) const override {
    schemes_[ref.tensor] = quant_.scheme_of(module_of(ref.tensor));
    if (const StoredTensor* codes = find_codes(ref); codes != nullptr) return check_integers(ref, *codes);
    TANDEM_ASSIGN(const StoredTensor* tensor, checkpoint_->require(ref.tensor, shape_of(ref, ref.n, ref.k)));
    if (tensor->kernel_dtype == DType::kF8E4M3) return check_float8(ref, *tensor);
    TANDEM_TRY(check_plain(*tensor));
    for (const std::string_view suffix : {"_scale_inv", "_scale"}) {
      const std::string scales = ref.tensor + std::string(suffix);
      if (!has(scales)) continue;
      return tensor_fault(*tensor, "has scales in \"{}\" but dtype {}, must be F8_E4M3{}; fetch the model again",
                          scales, tensor->dtype, suffix == "_scale" ? " or I8" : "");
    }
    return {};
  }

  Status check_vector(const std::string& name, int64_t n) const override {
    TANDEM_ASSIGN(const StoredTensor* tensor, checkpoint_->require(name, std::vector<int64_t>{n}));
    return check_plain(*tensor);
  }

  Status check_values(const MatrixRef& ref) const override {
    if (is_integer(ref)) return integers_of(ref).check_values();
    const HostMatrix matrix = view(ref);
    if (matrix.scales == nullptr) return {};
    const int64_t columns = ceil_div(matrix.k, matrix.block_k);
    const int64_t count = ceil_div(matrix.n, matrix.block_n) * columns;
    for (int64_t i = 0; i < count; ++i) {
      const float scale = kernels::load_scale(matrix, i);
      if (scale < 0 || (scale == 0 && !is_zero_block(matrix, i / columns, i % columns))) {
        return tensor_fault(*checkpoint_->find(scales_name(ref)),
                            "holds {} at [{}, {}], must be positive; fetch the file again", scale, i / columns,
                            i % columns);
      }
      if (std::isfinite(scale)) continue;
      return tensor_fault(*checkpoint_->find(scales_name(ref)),
                          "holds {} at [{}, {}], must be finite; fetch the file again", scale, i / columns,
                          i % columns);
    }
    return {};
  }

  std::optional<WeightFormat> integer_format(const MatrixRef& ref) const override {
    if (!is_integer(ref)) return std::nullopt;
    const QuantScheme& scheme = *scheme_of(ref);
    return scheme.has_format() ? std::optional(scheme.format()) : std::nullopt;
  }
  bool has_zeros(const MatrixRef& ref) const override {
    return is_integer(ref) && integers_of(ref).scheme().bits == 4 && integers_of(ref).has_zeros();
  }
  void read_integers(const MatrixRef& ref, int64_t first, int64_t count, const IntegerRows& out) const override {
    integers_of(ref).read_rows(first, count, out);
  }

  bool has_view(const MatrixRef& ref) const override { return !is_integer(ref); }
  HostMatrix view(const MatrixRef& ref) const override {
    const StoredTensor& tensor = *checkpoint_->find(ref.tensor);
    HostMatrix matrix;
    matrix.dtype = *tensor.kernel_dtype;
    matrix.n = ref.n;
    matrix.k = ref.k;
    matrix.data = tensor.data.data() + ref.slice * ref.n * ref.k * kernels::dtype_bytes(matrix.dtype);
    if (matrix.dtype != DType::kF8E4M3) return matrix;
    const QuantScheme& scheme = *scheme_of(ref);
    const StoredTensor& scales = *checkpoint_->find(scales_name(ref));
    matrix.scales_dtype = *scales.kernel_dtype;
    matrix.block_n = scheme.block_n == 0 ? ref.n : scheme.block_n;
    matrix.block_k = scheme.block_k == 0 ? ref.k : scheme.block_k;
    const int64_t scales_per_slice = ceil_div(ref.n, matrix.block_n) * ceil_div(ref.k, matrix.block_k);
    matrix.scales = scales.data.data() + ref.slice * scales_per_slice * kernels::dtype_bytes(matrix.scales_dtype);
    return matrix;
  }

  bool is_bf16(const MatrixRef& ref) const override {
    return !is_integer(ref) && checkpoint_->find(ref.tensor)->kernel_dtype == DType::kBf16;
  }

  void read_rows(const MatrixRef& ref, int64_t first, int64_t count, DType dtype, std::byte* out) const override {
    if (is_integer(ref)) {
      read_decoded(ref, first, count, dtype, out);
      return;
    }
    const HostMatrix matrix = view(ref);
    for (int64_t row = first; row < first + count; ++row) {
      if (dtype == DType::kBf16) {
        kernels::decode_row_bf16(matrix, row, 0, ref.k, reinterpret_cast<uint16_t*>(out));
      } else {
        kernels::decode_row(matrix, row, 0, ref.k, reinterpret_cast<float*>(out));
      }
      out += ref.k * kernels::dtype_bytes(dtype);
    }
  }

  std::vector<float> read_vector(const std::string& tensor, int64_t n) const override {
    std::vector<float> values(static_cast<size_t>(n));
    const StoredTensor& stored = *checkpoint_->find(tensor);
    HostMatrix matrix;
    matrix.data = stored.data.data();
    matrix.dtype = *stored.kernel_dtype;
    matrix.n = 1;
    matrix.k = n;
    kernels::decode_row(matrix, 0, 0, n, values.data());
    return values;
  }

  void add_fingerprint(const std::string& name, Sha256& hash) const override {
    for (const StoredTensor* tensor : tensors_of(name)) {
      hash.add(fmt::format("{} {} {}\n", tensor->name, tensor->dtype, shape_text(tensor->shape)));
      const size_t size = tensor->data.size();
      const size_t sample_bytes = std::min(size, kFingerprintSampleBytes);
      for (size_t i = 0; i < kFingerprintSamples; ++i) {
        const size_t begin = (size - sample_bytes) / (kFingerprintSamples - 1) * i;
        hash.add(tensor->data.subspan(begin, sample_bytes));
      }
    }
  }

  void release(const MatrixRef& ref) const override {
    for (const StoredTensor* tensor : tensors_of(ref.tensor)) {
      const size_t slices = static_cast<size_t>(std::max<int64_t>(ref.slices, 1));
      const size_t bytes = tensor->data.size() / slices;
      tensor->file->release(tensor->data.subspan(static_cast<size_t>(ref.slice) * bytes, bytes));
    }
  }

 private:
  // Known once check_matrix has seen the tensor.
  const QuantScheme* scheme_of(const MatrixRef& ref) const { return schemes_.find(ref.tensor)->second; }
  // The integer codes of a matrix, if that is what is stored.
  const StoredTensor* find_codes(const MatrixRef& ref) const {
    const std::string module(module_of(ref.tensor));
    for (const std::string_view suffix : {".weight_packed", ".qweight"}) {
      if (const StoredTensor* tensor = checkpoint_->find(module + std::string(suffix)); tensor != nullptr)
        return tensor;
    }
    const StoredTensor* weight = checkpoint_->find(ref.tensor);
    return weight != nullptr && weight->dtype == "I8" ? weight : nullptr;
  }
  bool is_integer(const MatrixRef& ref) const { return find_codes(ref) != nullptr; }

  Status check_integers(const MatrixRef& ref, const StoredTensor& codes) const {
    const QuantScheme* scheme = scheme_of(ref);
    if (scheme == nullptr) {
      return tensor_fault(codes, "is quantised, but {} ({}) says that this module is not; fetch the matching file",
                          quant_.path, quant_.method_name());
    }
    const bool fits = codes.name.ends_with(".qweight")
                          ? scheme->layout == QuantLayout::kAwq || scheme->layout == QuantLayout::kGptq
                      : codes.name.ends_with("_packed")
                          ? scheme->layout == QuantLayout::kWords
                          : scheme->layout == QuantLayout::kBytes || scheme->layout == QuantLayout::kAscendBytes;
    if (!fits || ref.slices != 0) {
      return tensor_fault(codes, "does not fit {}, which says {} ({}); fetch the matching file", quant_.path,
                          quant_.method_name(), scheme->describe());
    }
    const Result<StoredIntegers> found =
        StoredIntegers::find(*checkpoint_, quant_, *scheme, module_of(ref.tensor), ref.n, ref.k);
    return found.ok() ? Status() : Status(found.error());
  }

  Status check_float8(const MatrixRef& ref, const StoredTensor& tensor) const {
    if (quant_.method == QuantMethod::kNone) {
      return tensor_fault(tensor,
                          "is F8_E4M3, but config.json has no quantization_config; fetch the matching config.json");
    }
    const QuantScheme* scheme = scheme_of(ref);
    if (scheme == nullptr) {
      return tensor_fault(tensor, "is F8_E4M3, but {} excludes it; fetch the matching config.json",
                          quant_.method == QuantMethod::kFp8 ? "modules_to_not_convert" : "quantization_config");
    }
    if (scheme->layout != QuantLayout::kFloat8) {
      return tensor_fault(tensor, "is F8_E4M3, but quantization_config says {}; fetch the matching config.json",
                          scheme->describe());
    }
    const int64_t rows = scheme->block_n == 0 ? 1 : ceil_div(ref.n, scheme->block_n);
    const int64_t columns = scheme->block_k == 0 ? 1 : ceil_div(ref.k, scheme->block_k);
    const StoredTensor* scales = checkpoint_->find(scales_name(ref));
    const bool is_flat = scales != nullptr && ref.slices == 0 && columns == 1 && scales->shape == std::vector{rows};
    if (!is_flat) {
      TANDEM_ASSIGN(scales, checkpoint_->require(scales_name(ref), shape_of(ref, rows, columns)));
    }
    return check_plain(*scales);
  }

  // CHECKs what check_matrix found good.
  StoredIntegers integers_of(const MatrixRef& ref) const {
    return StoredIntegers::find(*checkpoint_, quant_, *scheme_of(ref), module_of(ref.tensor), ref.n, ref.k).value();
  }

  void read_decoded(const MatrixRef& ref, int64_t first, int64_t count, DType dtype, std::byte* out) const {
    if (dtype == DType::kF32) {
      integers_of(ref).decode_rows(first, count, reinterpret_cast<float*>(out));
      return;
    }
    std::vector<float> values(static_cast<size_t>(count * ref.k));
    integers_of(ref).decode_rows(first, count, values.data());
    uint16_t* target = reinterpret_cast<uint16_t*>(out);
    for (const float value : values) *target++ = kernels::bf16_from_float(value);
  }

  std::string scales_name(const MatrixRef& ref) const { return ref.tensor + std::string(scheme_of(ref)->scale_suffix); }

  // A vector, or all tensors that a weight matrix consists of.
  std::vector<const StoredTensor*> tensors_of(const std::string& name) const {
    std::vector<const StoredTensor*> tensors;
    const auto add = [&](const std::string& part) {
      if (const StoredTensor* tensor = checkpoint_->find(part); tensor != nullptr) tensors.push_back(tensor);
    };
    if (name.ends_with(kWeight)) {
      for (const std::string_view suffix : weight_suffixes()) add(std::string(module_of(name)) + std::string(suffix));
    } else {
      for (const char* suffix : {"", "_scale_inv", "_scale"}) add(name + suffix);
    }
    return tensors;
  }

  std::unique_ptr<Checkpoint> checkpoint_;
  QuantConfig quant_;
  mutable std::unordered_map<std::string, const QuantScheme*> schemes_;  // written by check_matrix alone
};

}  // namespace

std::unique_ptr<WeightSource> make_checkpoint_source(std::unique_ptr<Checkpoint> checkpoint, const QuantConfig& quant) {
  return std::make_unique<CheckpointSource>(std::move(checkpoint), quant);
}

}  // namespace tandem::model
