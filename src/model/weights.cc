#include "src/model/weights.h"

#include <algorithm>
#include <atomic>
#include <thread>

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::HostMatrix;
using kernels::kBf16Weights;
using kernels::kF32Weights;
using kernels::Weight;
using kernels::WeightFormat;

// Rows of one task, in pieces small enough that threads finish together.
constexpr int64_t kElementsPerPiece = int64_t{1} << 18;

// Calls work(i) for every i < count on up to `threads` threads, each i once.
void run_parallel(int threads, int64_t count, const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> next = 0;
  const auto run = [&] {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) work(i);
  };
  std::vector<std::jthread> helpers;
  for (int64_t i = 1; i < std::min<int64_t>(threads, count); ++i) helpers.emplace_back(run);
  run();
}

// The matrices of a task as dense arrays in memory of our own.
struct Dense {
  std::unique_ptr<std::byte[]> bytes;
  std::vector<HostMatrix> matrices;
};

Dense read_dense(const WeightSource& source, std::span<const MatrixRef> refs, int64_t parts, DType dtype, int threads) {
  const int64_t n = refs[0].n;
  const int64_t k = refs[0].k;
  const int64_t ref_bytes = n * k * kernels::dtype_bytes(dtype);
  const int64_t num_refs = static_cast<int64_t>(refs.size());
  Dense dense;
  dense.bytes = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(num_refs * ref_bytes));
  const int64_t rows_per_piece = std::max<int64_t>(1, kElementsPerPiece / k);
  const int64_t pieces_per_ref = (n + rows_per_piece - 1) / rows_per_piece;
  run_parallel(threads, num_refs * pieces_per_ref, [&](int64_t piece) {
    const int64_t ref = piece / pieces_per_ref;
    const int64_t first = piece % pieces_per_ref * rows_per_piece;
    std::byte* out = dense.bytes.get() + ref * ref_bytes + first * k * kernels::dtype_bytes(dtype);
    source.read_rows(refs[static_cast<size_t>(ref)], first, std::min(rows_per_piece, n - first), dtype, out);
  });
  for (int64_t i = 0; i < num_refs; i += parts) {
    HostMatrix matrix;
    matrix.data = dense.bytes.get() + i * ref_bytes;
    matrix.dtype = dtype;
    matrix.n = parts * n;
    matrix.k = k;
    dense.matrices.push_back(matrix);
  }
  return dense;
}

}  // namespace

void WeightPlan::note(const Status& status) {
  if (status_.ok() && !status.ok()) status_ = status;
}

void WeightPlan::linear(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k) {
  add_matrices("linear", {{module + ".weight", n, k}}, 1, linear_format(), out);
}

void WeightPlan::embedding(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k) {
  add_matrices("embedding", {{module + ".weight", n, k}}, 1, formats_.dense, out);
}

void WeightPlan::router(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k) {
  add_matrices("router", {{module + ".weight", n, k}}, 1, kF32Weights, out);
}

void WeightPlan::head(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k) {
  add_matrices("lm_head", {{module + ".weight", n, k}}, 1, formats_.head.value_or(formats_.dense), out);
}

void WeightPlan::batched(std::unique_ptr<Weight>& out, std::vector<MatrixRef> refs, int64_t parts) {
  const bool is_one = static_cast<int64_t>(refs.size()) == parts;
  add_matrices(is_one ? "linear" : "experts", std::move(refs), parts, linear_format(), out);
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

void WeightPlan::add_matrices(std::string_view kind, std::vector<MatrixRef> refs, int64_t parts, WeightFormat format,
                              std::unique_ptr<Weight>& out) {
  for (const MatrixRef& ref : refs) note(source_.check_matrix(ref));
  note_format(kind, format);
  Task task;
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

std::unique_ptr<Weight> WeightPlan::pack(std::span<const HostMatrix> matrices) {
  std::unique_ptr<Weight> weight = ops_.pack_weight(matrices, formats_.dense);
  loaded_.bytes += weight->bytes();
  return weight;
}

Status WeightPlan::load_matrices(const Task& task) {
  for (const MatrixRef& ref : task.refs) TANDEM_TRY(source_.check_values(ref));
  if (source_.is_stored() && task.parts == 1 && !task.must_be_dense) {
    std::vector<HostMatrix> matrices;
    for (const MatrixRef& ref : task.refs) matrices.push_back(source_.view(ref));
    task.use(matrices);
  } else {
    const bool all_bf16 =
        std::all_of(task.refs.begin(), task.refs.end(), [&](const MatrixRef& ref) { return source_.is_bf16(ref); });
    const DType dtype = all_bf16 || task.format == kBf16Weights ? DType::kBf16 : DType::kF32;
    task.use(read_dense(source_, task.refs, task.parts, dtype, ops_.num_threads()).matrices);
  }
  for (const MatrixRef& ref : task.refs) source_.release(ref);
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
    for (const MatrixRef& ref : task.refs) parameters += ref.n * ref.k;
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
      for (const MatrixRef& ref : task.refs) {
        if (ref.slice == 0) source_.add_fingerprint(ref.tensor, fingerprint);
      }
      TANDEM_TRY(load_matrices(task));
    }
    done += parameters_of(task);
    if (on_progress) on_progress(static_cast<double>(done) / static_cast<double>(loaded_.num_parameters));
  }
  return loaded_;
}

}  // namespace tandem::model
