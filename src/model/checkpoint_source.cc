#include <cmath>

#include "src/kernels/convert.h"
#include "src/kernels/host_matrix.h"
#include "src/model/sources.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::HostMatrix;

// Bytes of each tensor that enter the fingerprint: enough that any other training of the same shape differs.
constexpr size_t kFingerprintSamples = 16;
constexpr size_t kFingerprintSampleBytes = 16;

// "inv" by history: the values multiply.
constexpr std::string_view kScalesSuffix = "_scale_inv";

bool is_plain_float(std::optional<DType> dtype) {
  return dtype == DType::kBf16 || dtype == DType::kF32 || dtype == DType::kF16;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class CheckpointSource final : public WeightSource {
 public:
  CheckpointSource(std::unique_ptr<Checkpoint> checkpoint, const QuantConfig& quant)
      : checkpoint_(std::move(checkpoint)), quant_(quant) {}

  bool has(std::string_view tensor) const override { return checkpoint_->find(tensor) != nullptr; }
  bool is_stored() const override { return true; }

  Status check_matrix(const MatrixRef& ref) const override {
    TANDEM_ASSIGN(const StoredTensor* tensor, checkpoint_->require(ref.tensor, shape_of(ref, ref.n, ref.k)));
    const bool has_scales = has(scales_name(ref));
    if (tensor->kernel_dtype != DType::kF8E4M3) {
      TANDEM_TRY(check_plain(*tensor));
      if (!has_scales) return {};
      return fault(*tensor, "has scales in \"{}\" but dtype {}, must be F8_E4M3; fetch the model again",
                   scales_name(ref), tensor->dtype);
    }
    if (!quant_.is_fp8_block) {
      return fault(*tensor, "is F8_E4M3, but config.json has no quantization_config; fetch the matching config.json");
    }
    if (quant_.is_excluded(module_of(ref.tensor))) {
      return fault(*tensor, "is F8_E4M3, but modules_to_not_convert excludes it; fetch the matching config.json");
    }
    const std::vector<int64_t> scales_shape =
        shape_of(ref, ceil_div(ref.n, quant_.block_n), ceil_div(ref.k, quant_.block_k));
    TANDEM_ASSIGN(const StoredTensor* scales, checkpoint_->require(scales_name(ref), scales_shape));
    return check_plain(*scales);
  }

  Status check_vector(const std::string& name, int64_t n) const override {
    TANDEM_ASSIGN(const StoredTensor* tensor, checkpoint_->require(name, std::vector<int64_t>{n}));
    return check_plain(*tensor);
  }

  Status check_values(const MatrixRef& ref) const override {
    const HostMatrix matrix = view(ref);
    if (matrix.scales == nullptr) return {};
    HostMatrix scales;
    scales.data = matrix.scales;
    scales.dtype = matrix.scales_dtype;
    scales.n = ceil_div(matrix.n, matrix.block_n);
    scales.k = ceil_div(matrix.k, matrix.block_k);
    std::vector<float> row(static_cast<size_t>(scales.k));
    for (int64_t n = 0; n < scales.n; ++n) {
      kernels::decode_row(scales, n, 0, scales.k, row.data());
      for (size_t k = 0; k < row.size(); ++k) {
        if (std::isfinite(row[k])) continue;
        return fault(*checkpoint_->find(scales_name(ref)), "holds {} at [{}, {}], must be finite; fetch the file again",
                     row[k], n, k);
      }
    }
    return {};
  }

  HostMatrix view(const MatrixRef& ref) const override {
    const StoredTensor& tensor = *checkpoint_->find(ref.tensor);
    HostMatrix matrix;
    matrix.dtype = *tensor.kernel_dtype;
    matrix.n = ref.n;
    matrix.k = ref.k;
    matrix.data = tensor.data.data() + ref.slice * ref.n * ref.k * kernels::dtype_bytes(matrix.dtype);
    if (matrix.dtype != DType::kF8E4M3) return matrix;
    const StoredTensor& scales = *checkpoint_->find(scales_name(ref));
    matrix.scales_dtype = *scales.kernel_dtype;
    matrix.block_n = quant_.block_n;
    matrix.block_k = quant_.block_k;
    const int64_t scales_per_slice = ceil_div(ref.n, quant_.block_n) * ceil_div(ref.k, quant_.block_k);
    matrix.scales = scales.data.data() + ref.slice * scales_per_slice * kernels::dtype_bytes(matrix.scales_dtype);
    return matrix;
  }

  bool is_bf16(const MatrixRef& ref) const override {
    return checkpoint_->find(ref.tensor)->kernel_dtype == DType::kBf16;
  }

  void read_rows(const MatrixRef& ref, int64_t first, int64_t count, DType dtype, std::byte* out) const override {
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
    kernels::decode_row(view({tensor, 1, n}), 0, 0, n, values.data());
    return values;
  }

  void add_fingerprint(const std::string& name, Sha256& hash) const override {
    const StoredTensor& tensor = *checkpoint_->find(name);
    hash.add(fmt::format("{} {} {}\n", name, tensor.dtype, shape_text(tensor.shape)));
    const size_t size = tensor.data.size();
    const size_t sample_bytes = std::min(size, kFingerprintSampleBytes);
    for (size_t i = 0; i < kFingerprintSamples; ++i) {
      const size_t begin = (size - sample_bytes) / (kFingerprintSamples - 1) * i;
      hash.add(tensor.data.subspan(begin, sample_bytes));
    }
    const std::string scales = name + std::string(kScalesSuffix);
    if (has(scales)) add_fingerprint(scales, hash);
  }

  void release(const MatrixRef& ref) const override {
    const StoredTensor& tensor = *checkpoint_->find(ref.tensor);
    tensor.file->release(tensor.data);
  }

 private:
  static std::string scales_name(const MatrixRef& ref) { return ref.tensor + std::string(kScalesSuffix); }
  static std::string_view module_of(std::string_view tensor) {
    constexpr std::string_view kSuffix = ".weight";
    if (tensor.ends_with(kSuffix)) tensor.remove_suffix(kSuffix.size());
    return tensor;
  }
  static std::vector<int64_t> shape_of(const MatrixRef& ref, int64_t n, int64_t k) {
    if (ref.slices == 0) return {n, k};
    return {ref.slices, n, k};
  }
  template <typename... Args>
  static Error fault(const StoredTensor& tensor, fmt::format_string<Args...> format, Args&&... args) {
    return make_error(ErrorKind::kInvalidArgument, "{}: tensor \"{}\" {}", tensor.file->path(), tensor.name,
                      fmt::format(format, std::forward<Args>(args)...));
  }
  static Status check_plain(const StoredTensor& tensor) {
    if (is_plain_float(tensor.kernel_dtype)) return {};
    return fault(tensor,
                 "has dtype {}, must be BF16, F16 or F32 (or F8_E4M3 for a matrix with scales); use a release "
                 "of the model in one of these",
                 tensor.dtype);
  }

  std::unique_ptr<Checkpoint> checkpoint_;
  QuantConfig quant_;
};

}  // namespace

std::unique_ptr<WeightSource> make_checkpoint_source(std::unique_ptr<Checkpoint> checkpoint, const QuantConfig& quant) {
  return std::make_unique<CheckpointSource>(std::move(checkpoint), quant);
}

}  // namespace tandem::model
