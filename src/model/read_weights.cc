#include "src/model/read_weights.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>

namespace tandem::model {
namespace {

using kernels::DType;
using kernels::HostMatrix;
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

}  // namespace

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

DenseMatrices read_dense(const WeightSource& source, std::span<const MatrixRef> refs, int64_t parts, DType dtype,
                         int threads) {
  const int64_t n = refs[0].n;
  const int64_t k = refs[0].k;
  const int64_t row_bytes = k * kernels::dtype_bytes(dtype);
  DenseMatrices dense;
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

}  // namespace tandem::model
