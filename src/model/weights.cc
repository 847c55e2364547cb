#include "src/model/weights.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "src/kernels/integer.h"
#include "src/model/json_fields.h"

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::HostMatrix;
using kernels::kBf16Weights;
using kernels::kF32Weights;
using kernels::Weight;
using kernels::WeightFormat;

// Elements that one thread takes at a time: as bf16 and as f32 they fit in a second-level cache.
constexpr int64_t kElementsPerPiece = int64_t{1} << 16;
// Elements of a source that are read before its pages are given back.
constexpr int64_t kElementsPerWindow = int64_t{1} << 26;

// Calls work(i, thread) for every i < count on up to `threads` threads, each i once.
void run_parallel(int threads, int64_t count, const std::function<void(int64_t, size_t)>& work) {
  std::atomic<int64_t> next = 0;
  const auto run = [&](size_t thread) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) work(i, thread);
  };
  std::vector<std::jthread> helpers;
  for (int64_t i = 1; i < std::min<int64_t>(threads, count); ++i) helpers.emplace_back(run, static_cast<size_t>(i));
  run(0);
}

// Some rows of the matrix refs[ref].
struct Piece {
  size_t ref = 0;
  int64_t first = 0;
  int64_t count = 0;
  size_t thread = 0;
};

// Reads all matrices piece by piece in parallel, and gives back the pages of those that are done window by window.
void read_pieces(const WeightSource& source, std::span<const MatrixRef> refs, int threads,
                 const std::function<void(const Piece&)>& read) {
  const int64_t n = refs[0].n;
  const int64_t k = refs[0].k;
  const int64_t rows_per_piece = std::max<int64_t>(8, kElementsPerPiece / k / 8 * 8);
  const int64_t pieces_per_ref = (n + rows_per_piece - 1) / rows_per_piece;
  const size_t refs_per_window = static_cast<size_t>(std::max<int64_t>(1, kElementsPerWindow / (n * k)));
  for (size_t begin = 0; begin < refs.size(); begin += refs_per_window) {
    const size_t count = std::min(refs_per_window, refs.size() - begin);
    run_parallel(threads, static_cast<int64_t>(count) * pieces_per_ref, [&](int64_t index, size_t thread) {
      const int64_t first = index % pieces_per_ref * rows_per_piece;
      read({begin + static_cast<size_t>(index / pieces_per_ref), first, std::min(rows_per_piece, n - first), thread});
    });
    for (const MatrixRef& ref : refs.subspan(begin, count)) source.release(ref);
  }
}

// Fills `buffer` with the matrices as `format`: code by code where they are stored so, else quantised. False if a value
// to quantise is not finite.
bool read_integers(const WeightSource& source, std::span<const MatrixRef> refs, const WeightFormat& format, int threads,
                   IntegerBuffer* buffer) {
  const int64_t n = refs[0].n;
  const int64_t k = refs[0].k;
  const bool is_stored = source.integer_format(refs[0]).has_value();
  const bool has_zeros =
      is_stored && std::any_of(refs.begin(), refs.end(), [&](const MatrixRef& ref) { return source.has_zeros(ref); });
  buffer->resize(std::ssize(refs) * n, k, format, has_zeros);
  struct Scratch {
    std::vector<uint16_t> halves;
    std::vector<float> floats;
  };
  std::vector<Scratch> scratch(static_cast<size_t>(threads));
  std::atomic<bool> is_finite = true;
  read_pieces(source, refs, threads, [&](const Piece& piece) {
    const MatrixRef& ref = refs[piece.ref];
    const IntegerRows out = buffer->rows().from(static_cast<int64_t>(piece.ref) * n + piece.first);
    if (is_stored) {
      source.read_integers(ref, piece.first, piece.count, out);
      return;
    }
    Scratch& mine = scratch[piece.thread];
    const size_t size = static_cast<size_t>(piece.count * k);
    mine.floats.resize(std::max(mine.floats.size(), size));
    if (source.is_bf16(ref)) {
      mine.halves.resize(std::max(mine.halves.size(), size));
      source.read_rows(ref, piece.first, piece.count, DType::kBf16, reinterpret_cast<std::byte*>(mine.halves.data()));
      floats_from_bf16(mine.halves.data(), piece.count * k, mine.floats.data());
    } else {
      source.read_rows(ref, piece.first, piece.count, DType::kF32, reinterpret_cast<std::byte*>(mine.floats.data()));
    }
    if (!quantise_rows(mine.floats.data(), piece.count, k, format, out)) is_finite = false;
  });
  return is_finite;
}

// The matrices as dense arrays in memory of our own.
struct Dense {
  std::unique_ptr<std::byte[]> bytes;
  std::vector<HostMatrix> matrices;
};

Dense read_dense(const WeightSource& source, std::span<const MatrixRef> refs, int64_t parts, DType dtype, int threads) {
  const int64_t n = refs[0].n;
  const int64_t k = refs[0].k;
  const int64_t row_bytes = k * kernels::dtype_bytes(dtype);
  Dense dense;
  dense.bytes = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(std::ssize(refs) * n * row_bytes));
  read_pieces(source, refs, threads, [&](const Piece& piece) {
    std::byte* out = dense.bytes.get() + (static_cast<int64_t>(piece.ref) * n + piece.first) * row_bytes;
    source.read_rows(refs[piece.ref], piece.first, piece.count, dtype, out);
  });
  for (int64_t i = 0; i < std::ssize(refs); i += parts) {
    HostMatrix matrix;
    matrix.data = dense.bytes.get() + i * n * row_bytes;
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
  add_matrices("linear", {{module + ".weight", n, k}}, 1, formats_.linear, out);
}

void WeightPlan::embedding(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k) {
  add_matrices("embedding", {{module + ".weight", n, k}}, 1, formats_.dense, out);
}

void WeightPlan::router(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k) {
  add_matrices("router", {{module + ".weight", n, k}}, 1, kF32Weights, out);
}

void WeightPlan::head(std::unique_ptr<Weight>& out, const std::string& module, int64_t n, int64_t k) {
  add_matrices("lm_head", {{module + ".weight", n, k}}, 1, formats_.head, out);
}

void WeightPlan::batched(std::unique_ptr<Weight>& out, std::vector<MatrixRef> refs, int64_t parts) {
  const bool is_one = static_cast<int64_t>(refs.size()) == parts;
  add_matrices(is_one ? "linear" : "experts", std::move(refs), parts, formats_.linear, out);
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
WeightFormat WeightPlan::choose_format(const std::vector<MatrixRef>& refs, const std::optional<WeightFormat>& wanted) {
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
    note(invalid_argument("quantization",
                          "--quantization asks for {}, but tensor \"{}\" is {} in the checkpoint, and quantising twice "
                          "loses too much; use auto, or an unquantised release",
                          kernels::weight_format_name(format), printable(refs[0].tensor),
                          kernels::weight_format_name(*stored)));
  }
  return format;
}

void WeightPlan::add_matrices(std::string_view kind, std::vector<MatrixRef> refs, int64_t parts,
                              const std::optional<WeightFormat>& wanted, std::unique_ptr<Weight>& out) {
  for (const MatrixRef& ref : refs) note(source_.check_matrix(ref));
  const WeightFormat format = status_.ok() ? choose_format(refs, wanted) : formats_.dense;
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
  if (task.format.is_integer()) {
    if (!read_integers(source_, task.refs, task.format, ops_.num_threads(), &integers_)) {
      return make_error(
          ErrorKind::kDataLoss,
          "tensor \"{}\", or one that is stored beside it, holds a value that is not finite and cannot be "
          "quantised; fetch the file again",
          printable(task.refs[0].tensor));
    }
    task.use(integers_.matrices(task.parts * task.refs[0].n));
    return {};
  }
  const bool all_have_views =
      std::all_of(task.refs.begin(), task.refs.end(), [&](const MatrixRef& ref) { return source_.has_view(ref); });
  if (all_have_views && task.parts == 1 && !task.must_be_dense) {
    std::vector<HostMatrix> matrices;
    for (const MatrixRef& ref : task.refs) matrices.push_back(source_.view(ref));
    task.use(matrices);
    for (const MatrixRef& ref : task.refs) source_.release(ref);
    return {};
  }
  const bool all_bf16 =
      std::all_of(task.refs.begin(), task.refs.end(), [&](const MatrixRef& ref) { return source_.is_bf16(ref); });
  const DType dtype = all_bf16 || task.format == kBf16Weights ? DType::kBf16 : DType::kF32;
  task.use(read_dense(source_, task.refs, task.parts, dtype, ops_.num_threads()).matrices);
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
  integers_ = IntegerBuffer();
  return loaded_;
}

}  // namespace tandem::model
