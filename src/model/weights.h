// How a model gets its weights. A model lists every tensor it needs once (names, shapes, and where the packed result
// goes); listing checks names and shapes against the source, so that the first fault is found before any weight is
// read. load() then reads and packs them one by one.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/hash.h"
#include "src/base/result.h"
#include "src/kernels/ops.h"
#include "src/model/device_tensor.h"
#include "src/model/integer_rows.h"
#include "src/model/matrix_part.h"
#include "src/model/quantization.h"
#include "src/model/tensor_exchange.h"

namespace tandem::model {

// One matrix [n, k] of a source: a tensor of that shape, or slice `slice` of a tensor [slices, n, k].
struct MatrixRef {
  std::string tensor;
  int64_t n = 0;
  int64_t k = 0;
  int64_t slice = 0;
  int64_t slices = 0;  // 0: not sliced
};

// Where weights come from: a checkpoint (checkpoint_source.cc) or a generator (dummy_source.cc).
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual bool has(std::string_view tensor) const = 0;
  // Whether the tensor can be used with these sizes; looks at headers only.
  virtual Status check_matrix(const MatrixRef& ref) const = 0;
  virtual Status check_vector(const std::string& tensor, int64_t n) const = 0;
  // Whether its values can be used; called just before they are.
  virtual Status check_values(const MatrixRef& ref) const = 0;

  // The format to which the matrix can be packed code by code, if it is stored as integers.
  virtual std::optional<kernels::WeightFormat> integer_format(const MatrixRef& ref) const = 0;
  // Whether its rows have zeros that are not all the middle code.
  virtual bool has_zeros(const MatrixRef& ref) const = 0;
  // Rows [first, first + count) of it, `first` a multiple of 8. Thread-safe.
  virtual void read_integers(const MatrixRef& ref, int64_t first, int64_t count, const IntegerRows& out) const = 0;

  // True if the matrix lies in memory as floats and view() may be called.
  virtual bool has_view(const MatrixRef& ref) const = 0;
  virtual kernels::HostMatrix view(const MatrixRef& ref) const = 0;
  // True if no value of the matrix loses anything in bf16.
  virtual bool is_bf16(const MatrixRef& ref) const = 0;
  // Rows [first, first + count), `first` a multiple of 8, as a dense [count, k] array of `dtype`, kBf16 (only if
  // is_bf16 or kBf16 is what it will be packed to) or kF32. Thread-safe.
  virtual void read_rows(const MatrixRef& ref, int64_t first, int64_t count, kernels::DType dtype,
                         std::byte* out) const = 0;
  virtual std::vector<float> read_vector(const std::string& tensor, int64_t n) const = 0;

  // Adds the identity (names, shapes, some bytes) of a vector, or of all tensors of a matrix, to a fingerprint.
  virtual void add_fingerprint(const std::string& tensor, Sha256& hash) const = 0;
  // Says that the matrix is not needed again.
  virtual void release(const MatrixRef& ref) const = 0;
};

struct LoadedWeights {
  int64_t num_parameters = 0;
  int64_t bytes = 0;            // packed, on the device
  int64_t expert_bytes = 0;     // of these
  int64_t embedding_bytes = 0;  // of these
  // Weights of integers, by how their scales are kept.
  int64_t num_f16_scaled = 0;
  int64_t num_f32_scaled = 0;
};

class WeightPlan {
 public:
  using Use = std::function<void(std::span<const kernels::HostMatrix>)>;

  // One packed weight, or one vector.
  struct Task {
    std::vector<MatrixRef> refs;
    std::vector<MatrixRef> identity;  // what enters the fingerprint instead, if only a part is loaded
    int64_t parts = 1;
    MatrixPart kept;  // of each ref
    bool must_be_dense = false;
    kernels::WeightFormat format = kernels::kBf16Weights;
    Use use;
    // Or, for a vector:
    DeviceTensor* vector = nullptr;
    std::string tensor;
    int64_t n = 0;
  };

  WeightPlan(kernels::Ops& ops, kernels::Stream& stream, const WeightSource& source, WeightFormats formats)
      : ops_(ops), stream_(stream), source_(source), formats_(std::move(formats)) {}

  const WeightSource& source() const { return source_; }

  // Before anything is listed: of what is split, this rank's part is loaded.
  void set_shard(const TensorShard& shard) { shard_ = shard; }

  // Every `out` must stay where it is until load() has returned. Sizes are those of the whole matrix.

  // "<module>.weight" [n, k].
  void linear(std::unique_ptr<kernels::Weight>& out, const std::string& module, int64_t n, int64_t k,
              Split split = Split::kNone);
  // The same for what queries, keys and latents are computed by, whose input is not rounded to bf16: attention makes
  // more of an error in its scores than other layers make of theirs (docs/performance.md).
  void attention_input(std::unique_ptr<kernels::Weight>& out, const std::string& module, int64_t n, int64_t k,
                       Split split = Split::kNone);
  // The same, never quantised.
  void embedding(std::unique_ptr<kernels::Weight>& out, const std::string& module, int64_t n, int64_t k);
  // The same, without loss: bf16 if it is stored so, else f32, and multiplied in f32.
  void router(std::unique_ptr<kernels::Weight>& out, const std::string& module, int64_t n, int64_t k);
  // The same in the format of the output head.
  void head(std::unique_ptr<kernels::Weight>& out, const std::string& module, int64_t n, int64_t k,
            Split split = Split::kNone);
  // `batch` matrices, each the rows of `parts` consecutive refs on top of each other; all refs have the same n and k.
  // Of a split one each ref is split.
  void batched(std::unique_ptr<kernels::Weight>& out, std::vector<MatrixRef> refs, int64_t parts,
               Split split = Split::kNone);
  // Of such a batch only the matrices `chosen`, in that order; the others are checked and enter the fingerprint.
  void batched_subset(std::unique_ptr<kernels::Weight>& out, std::vector<MatrixRef> refs, int64_t parts,
                      std::span<const int32_t> chosen);
  // A vector of n values, as f32 [1, n].
  void vector(DeviceTensor& out, const std::string& tensor, int64_t n);
  // Hands "<module>.weight" [n, k], dequantised and dense (bf16 or f32, row_stride 0), to `use`, which packs what it
  // derives from it with pack().
  void derived(const std::string& module, int64_t n, int64_t k, Use use);

  // For the `use` of derived(). With `wide_input` products do not round their input to bf16.
  std::unique_ptr<kernels::Weight> pack(std::span<const kernels::HostMatrix> matrices, bool wide_input = false);

  // "experts int4 g128 a8, linear int8 a8, lm_head bf16, …": the formats of all that is listed.
  std::string describe_formats() const;
  // All that is listed, in order.
  std::span<const Task> tasks() const { return tasks_; }
  // The first fault found while listing.
  const Status& status() const { return status_; }
  // Reads, packs and hashes everything in the order of the list. `on_progress` may be empty.
  Result<LoadedWeights> load(Sha256& fingerprint, const std::function<void(double fraction)>& on_progress);

 private:
  void add_matrices(std::string_view kind, std::vector<MatrixRef> refs, int64_t parts,
                    const std::optional<kernels::WeightFormat>& wanted, std::unique_ptr<kernels::Weight>& out,
                    Split split = Split::kNone);
  kernels::WeightFormat choose_format(std::string_view kind, const std::vector<MatrixRef>& refs,
                                      const std::optional<kernels::WeightFormat>& wanted);
  void note_format(std::string_view kind, const kernels::WeightFormat& format);
  void note(const Status& status);
  Status load_matrices(const Task& task);
  void load_vector(const Task& task);

  kernels::Ops& ops_;
  kernels::Stream& stream_;
  const WeightSource& source_;
  WeightFormats formats_;
  TensorShard shard_;
  std::vector<Task> tasks_;
  // Kinds of weights in the order of their first mention, each with its formats and how many weights have them.
  std::vector<std::pair<std::string, std::map<std::string, int64_t>>> kinds_;
  Status status_;
  LoadedWeights loaded_;
  IntegerBuffer integers_;  // of the weight that is being loaded
};

}  // namespace tandem::model
