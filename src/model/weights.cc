#include "src/model/weights.h"

#include <algorithm>

#include "src/kernels/integer.h"
#include "src/model/json_fields.h"
#include "src/model/read_weights.h"

namespace tandem::model {

using kernels::DType;
using kernels::HostMatrix;
using kernels::kBf16Weights;
using kernels::kF32Weights;
using kernels::Weight;
using kernels::WeightFormat;

namespace {

Status check_group_columns(const MatrixRef& ref, const WeightFormat& format) {
  if (!format.is_integer()) return {};
  const int64_t columns = kernels::group_columns(ref.k, format);
  if (columns <= kernels::kMaxGroupColumns) return {};
  return invalid_argument("quantization",
                          "{}: {} columns share a scale, at most {} can be summed exactly; use --quantization wint4 or "
                          "w4a8 with a --quantization-group-size, or auto",
                          ref.tensor, columns, kernels::kMaxGroupColumns);
}

WeightFormat with_wide_input(const WeightFormat& format) {
  return format == kBf16Weights ? kernels::kBf16WeightsWideInput : format;
}

}  // namespace

void WeightPlan::note(const Status& status) {
  if (status_.ok() && !status.ok()) status_ = status;
}

void WeightPlan::linear(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k, Split split) {
  add_matrices("linear", {{module + ".weight", n, k}}, 1, formats_.linear, out, split);
}

void WeightPlan::attention_input(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k,
                                 Split split) {
  add_matrices("attention input", {{module + ".weight", n, k}}, 1, formats_.linear, out, split);
}

void WeightPlan::embedding(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k) {
  add_matrices("embedding", {{module + ".weight", n, k}}, 1, formats_.dense, out);
}

void WeightPlan::router(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k) {
  const MatrixRef ref{module + ".weight", n, k};
  const bool is_bf16 = source_.check_matrix(ref).ok() && source_.is_bf16(ref);
  add_matrices("router", {ref}, 1, is_bf16 ? kernels::kBf16WeightsWideInput : kF32Weights, out);
}

void WeightPlan::head(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k, Split split) {
  const MatrixRef ref{module + ".weight", n, k};
  std::optional<WeightFormat> wanted = formats_.head;
  if (wanted && formats_.head_is_default && source_.check_matrix(ref).ok()) {
    const int64_t activation_bits = wanted->activation_bits;
    wanted = source_.integer_format(ref).value_or(*wanted);
    wanted->activation_bits = activation_bits;
  }
  add_matrices("lm_head", {ref}, 1, wanted, out, split);
}

void WeightPlan::batched(std::unique_ptr<Weight>& out, std::vector<MatrixRef> refs, int64_t parts, Split split) {
  const bool is_one = static_cast<int64_t>(refs.size()) == parts;
  add_matrices(is_one ? "linear" : "experts", std::move(refs), parts, formats_.linear, out, split);
}

void WeightPlan::batched_subset(std::unique_ptr<Weight>& out, std::vector<MatrixRef> refs, int64_t parts,
                                std::span<const int32_t> chosen) {
  batched(out, std::move(refs), parts);
  Task& task = tasks_.back();
  const int64_t num_matrices = std::ssize(task.refs) / parts;
  const bool is_all = std::ssize(chosen) == num_matrices && std::is_sorted(chosen.begin(), chosen.end());
  if (is_all && chosen.front() == 0) return;
  task.identity = std::move(task.refs);
  task.refs.clear();
  for (const int32_t matrix : chosen) {
    CHECK_LT(matrix * parts, std::ssize(task.identity));
    const auto first = task.identity.begin() + matrix * parts;
    task.refs.insert(task.refs.end(), first, first + parts);
  }
  CHECK(!task.refs.empty());
}

void WeightPlan::note_format(std::string_view kind, const WeightFormat& format) {
  auto it = std::find_if(kinds_.begin(), kinds_.end(), [&](const auto& entry) { return entry.first == kind; });
  if (it == kinds_.end()) it = kinds_.insert(it, {std::string(kind), {}});
  ++it->second[kernels::weight_format_name(format)];
}

std::string WeightPlan::describe_formats() const {
  std::string text;
  for (const auto& [kind, formats] : kinds_) {
    text += (text.empty() ? "" : ", ") + kind;
    for (const auto& [format, count] : formats) {
      text += formats.size() == 1 ? " " + format : fmt::format(" {} ({} of them)", format, count);
    }
  }
  return text;
}

// What the refs are packed to: what was asked for, else what they are stored as.
WeightFormat WeightPlan::choose_format(std::string_view kind, const std::vector<MatrixRef>& refs,
                                       const std::optional<WeightFormat>& wanted) {
  const std::optional<WeightFormat> stored = source_.integer_format(refs[0]);
  for (const MatrixRef& ref : refs) {
    const std::optional<WeightFormat> other = source_.integer_format(ref);
    if (other == stored) continue;
    const auto name = [](const std::optional<WeightFormat>& format) {
      return format ? kernels::weight_format_name(*format) : std::string("not integers");
    };
    note(make_error(ErrorKind::kInvalidArgument,
                    "tensor \"{}\" is {}, but \"{}\", which is computed together with it, is {}; use a release that "
                    "quantises both alike",
                    printable(refs[0].tensor), name(stored), printable(ref.tensor), name(other)));
    break;
  }
  if (!wanted || !wanted->is_integer() || !stored) return wanted.value_or(stored.value_or(formats_.dense));
  WeightFormat format = *wanted;
  if (stored->type != format.type ||
      kernels::group_columns(refs[0].k, *stored) != kernels::group_columns(refs[0].k, format)) {
    const char* option = kind == "lm_head" ? "lm-head-quantization" : "quantization";
    note(invalid_argument(option,
                          "--{} asks for {}, but tensor \"{}\" is {} in the checkpoint, and quantising twice "
                          "loses too much; use auto, or an unquantised release",
                          option, kernels::weight_format_name(format), printable(refs[0].tensor),
                          kernels::weight_format_name(*stored)));
  }
  return format;
}

void WeightPlan::add_matrices(std::string_view kind, std::vector<MatrixRef> refs, int64_t parts,
                              const std::optional<WeightFormat>& wanted, std::unique_ptr<Weight>& out, Split split) {
  for (const MatrixRef& ref : refs) note(source_.check_matrix(ref));
  WeightFormat format = status_.ok() ? choose_format(kind, refs, wanted) : formats_.dense;
  if (kind == "attention input") format = with_wide_input(format);
  note_format(kind, format);
  note(check_group_columns(refs[0], format));
  Task task;
  task.kept = {split, shard_.rank, shard_.size};
  note(check_part(refs[0].tensor, refs[0].n, refs[0].k, format, task.kept));
  task.refs = std::move(refs);
  task.parts = parts;
  task.format = format;
  int64_t* const kind_bytes = kind == "experts"     ? &loaded_.expert_bytes
                              : kind == "embedding" ? &loaded_.embedding_bytes
                                                    : nullptr;
  task.use = [this, format, kind_bytes, &out](std::span<const HostMatrix> matrices) {
    out = ops_.pack_weight(matrices, format);
    loaded_.bytes += out->bytes();
    if (kind_bytes != nullptr) *kind_bytes += out->bytes();
    if (format.is_integer()) ++(out->scale_dtype() == DType::kF16 ? loaded_.num_f16_scaled : loaded_.num_f32_scaled);
  };
  tasks_.push_back(std::move(task));
}

void WeightPlan::vector(DeviceTensor& out, const std::string& tensor, int64_t n) {
  note(source_.check_vector(tensor, n));
  Task task;
  task.vector = &out;
  task.tensor = tensor;
  task.n = n;
  tasks_.push_back(std::move(task));
}

void WeightPlan::derived(const std::string& module, int64_t n, int64_t k, Use use) {
  MatrixRef ref{module + ".weight", n, k};
  note(source_.check_matrix(ref));
  note_format("kv_b", formats_.dense);
  Task task;
  task.refs.push_back(std::move(ref));
  task.must_be_dense = true;
  task.format = formats_.dense;
  task.use = std::move(use);
  tasks_.push_back(std::move(task));
}

std::unique_ptr<Weight> WeightPlan::pack(std::span<const HostMatrix> matrices, bool wide_input) {
  const WeightFormat format = wide_input ? with_wide_input(formats_.dense) : formats_.dense;
  std::unique_ptr<Weight> weight = ops_.pack_weight(matrices, format);
  loaded_.bytes += weight->bytes();
  return weight;
}

Status WeightPlan::load_matrices(const Task& task) {
  for (const MatrixRef& ref : task.refs) TANDEM_TRY(source_.check_values(ref));
  if (task.format.is_integer()) {
    if (!read_integers(source_, task.refs, task.format, ops_.num_threads(), &integers_)) {
      return make_error(
          ErrorKind::kDataLoss,
          "tensor \"{}\", or one that is stored beside it, holds a value that is not finite and cannot be "
          "quantised; fetch the file again",
          printable(task.refs[0].tensor));
    }
    const std::vector<HostMatrix> whole = integers_.matrices(task.parts * task.refs[0].n);
    task.use(MatrixParts(whole, task.parts, task.kept).matrices());
    return {};
  }
  const bool all_have_views =
      std::all_of(task.refs.begin(), task.refs.end(), [&](const MatrixRef& ref) { return source_.has_view(ref); });
  if (all_have_views && task.parts == 1 && !task.must_be_dense) {
    std::vector<HostMatrix> matrices;
    for (const MatrixRef& ref : task.refs) matrices.push_back(source_.view(ref));
    if (task.kept.is_all() || matrices.front().scales == nullptr) {
      task.use(MatrixParts(matrices, 1, task.kept).matrices());
      for (const MatrixRef& ref : task.refs) source_.release(ref);
      return {};
    }
  }
  const bool all_bf16 =
      std::all_of(task.refs.begin(), task.refs.end(), [&](const MatrixRef& ref) { return source_.is_bf16(ref); });
  const DType dtype = all_bf16 || task.format.type == kernels::WeightType::kBf16 ? DType::kBf16 : DType::kF32;
  const DenseMatrices whole = read_dense(source_, task.refs, task.parts, dtype, ops_.num_threads());
  task.use(MatrixParts(whole.matrices, task.parts, task.kept).matrices());
  return {};
}

void WeightPlan::load_vector(const Task& task) {
  const std::vector<float> values = source_.read_vector(task.tensor, task.n);
  *task.vector = DeviceTensor(ops_, DType::kF32, 1, task.n);
  task.vector->upload<float>(ops_, stream_, values);
  ops_.synchronize(stream_);
  loaded_.bytes += task.vector->bytes();
}

Result<LoadedWeights> WeightPlan::load(Sha256& fingerprint, const std::function<void(double fraction)>& on_progress) {
  CHECK(status_.ok());
  const auto parameters_of = [](const Task& task) {
    int64_t parameters = task.n;
    for (const MatrixRef& ref : task.refs) parameters += task.kept.share_of(ref.n * ref.k);
    return parameters;
  };
  loaded_ = {};
  for (const Task& task : tasks_) loaded_.num_parameters += parameters_of(task);
  int64_t done = 0;
  for (const Task& task : tasks_) {
    if (task.vector != nullptr) {
      load_vector(task);
      source_.add_fingerprint(task.tensor, fingerprint);
    } else {
      for (const MatrixRef& ref : task.identity.empty() ? task.refs : task.identity) {
        if (ref.slice == 0) source_.add_fingerprint(ref.tensor, fingerprint);
      }
      TANDEM_TRY(load_matrices(task));
    }
    done += parameters_of(task);
    if (on_progress) on_progress(static_cast<double>(done) / static_cast<double>(loaded_.num_parameters));
  }
  integers_ = IntegerBuffer();
  return loaded_;
}

}  // namespace tandem::model
