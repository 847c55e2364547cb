// The operation table: everything a model may ask of a device. Backends: ref/ (plain C++, the oracle, always built)
// and cpu/ (one file per instruction set).
//
// Contract of every operation
//  - It is enqueued on a stream, returns nothing to the host and never waits; operations of one stream run in order.
//    `read_back` and `synchronize` are the only ways to wait.
//  - Exact: row t of an output is a function of row t of the inputs (and of the KV cache up to its position) alone.
//    It does not depend on the number of rows, on the row's place, on the thread count or on the split of the work:
//    every reduction has a fixed order, attention walks fixed tiles by absolute position, ties go to the lowest index.
//  - Activations have the dtype `activation_dtype()` (f32 on CPU backends); sums are f32. A backend may round an
//    activation row to a weight's own format inside `linear`, per row, unless that is kBf16WeightsWideInput.
//  - Sizes are 64-bit; shapes are CHECKed, since a wrong shape is a bug of the caller.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/result.h"
#include "src/kernels/tensor.h"

namespace tandem::kernels {

// Owns device memory; freed on destruction. Zeroed when allocated, so that no earlier owner's data can show.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual std::byte* address() const = 0;
  virtual int64_t bytes() const = 0;
  // The descriptor through which other processes of this host may map the buffer; -1 if they cannot.
  virtual int shared_fd() const { return -1; }
  // Makes the memory of a part present, so that who writes there first does not wait for the system. Its content stays.
  // From any thread. Nothing is to be done where memory is present from the beginning.
  virtual Status populate(int64_t offset, int64_t bytes) {
    (void)offset, (void)bytes;
    return {};
  }
};

// An in-order queue of operations of one device. Used by one thread at a time.
class Stream {
 public:
  virtual ~Stream() = default;
};

// One weight matrix [n, k] as it stands in a checkpoint, in host memory (often mmapped, any alignment).
// y = x · Wᵀ. The types that carry `scales` have one for every block of block_n rows and block_k columns, a
// [ceil(n / block_n), ceil(k / block_k)] row-major matrix of kF32, kBf16 or kF16:
//  kF8E4M3: w = fp8 * scale
//  kI8:     w = q * scale
//  kU4:     w = (q - zero) * scale; two columns per byte, the even one in the low nibble. `zeros` has the shape of
//           `scales`, a byte 0 … 15 for each; null means 8 everywhere.
struct HostMatrix {
  const std::byte* data = nullptr;
  DType dtype = DType::kBf16;
  int64_t n = 0;
  int64_t k = 0;
  int64_t row_stride = 0;  // in elements; 0 means k, for kU4 rounded up to an even number
  const std::byte* scales = nullptr;
  DType scales_dtype = DType::kF32;
  int64_t block_n = 0;
  int64_t block_k = 0;
  const std::byte* zeros = nullptr;
};

enum class WeightType : uint8_t { kF32, kBf16, kInt8, kInt4 };

// How a backend keeps a packed weight and, for the integer types, what it multiplies it with.
//
// An integer weight is w = (q - zero) * scale with one scale (and zero) per row and `group_size` columns. Activation
// rows are rounded to integers with one scale per row and group: 8 bits as x ≈ scale * q, q in -127 … 127, or 16 bits
// as q in -32512 … 32512 (127 * 256). Products of a group are summed in integers, hence exactly, and groups in f32 in
// ascending order; so all instruction sets that follow this rule give the same bits. A HostMatrix of the same type and
// group is taken as it is; any other is decoded and quantised: symmetric, scale = the group's largest magnitude / 127
// (kInt8) or / 7 (kInt4, so that q - zero is in -7 … 7), with a group_size rounded to f16 (integer.h). Scales are f32
// to the arithmetic; a backend may keep those of a weight in 16 bits if f16 holds all of them exactly, which changes no
// result.
struct WeightFormat {
  WeightType type = WeightType::kBf16;
  int64_t group_size = 0;       // 0: the whole row. A last group may be shorter
  int64_t activation_bits = 0;  // 8 or 16 for the integer types; 32 with kBf16: x is not rounded to bf16

  bool is_integer() const { return type == WeightType::kInt8 || type == WeightType::kInt4; }
  bool operator==(const WeightFormat&) const = default;
};
inline constexpr WeightFormat kF32Weights{WeightType::kF32};
inline constexpr WeightFormat kBf16Weights{WeightType::kBf16};
inline constexpr WeightFormat kBf16WeightsWideInput{WeightType::kBf16, 0, 32};
// "f32", "bf16", "int8 a8", "int4 g128 a16", …
std::string weight_format_name(const WeightFormat& format);

// `batch` matrices [n, k] packed for one backend; used only with the Ops that packed it.
class Weight {
 public:
  virtual ~Weight() = default;
  virtual int64_t batch() const = 0;
  virtual int64_t n() const = 0;
  virtual int64_t k() const = 0;
  virtual WeightFormat format() const = 0;
  virtual int64_t bytes() const = 0;
  // Of an integer weight: kF32, or kF16 where the scales are kept so.
  virtual DType scale_dtype() const = 0;

  // A matrix as bytes, scales included, so that it can be copied to another weight of the same n, k, format() and
  // scale_dtype(), also in another process. 0 bytes: this backend's matrices cannot.
  virtual int64_t matrix_bytes() const { return 0; }
  virtual std::byte* matrix(int64_t /*index*/) { return nullptr; }
  // From now on the matrix lies in `memory`, matrix_bytes() of Ops::allocate() that outlive this. Returns where it lay,
  // which may be used for another one. Between operations only.
  virtual std::byte* replace_matrix(int64_t /*index*/, std::byte* /*memory*/) { return nullptr; }
};

// How an activation row travels to experts that another rank holds.
enum class RowFormat : uint8_t {
  kExact,   // as the experts' first product takes rows anyway, so that nothing is lost: f32, bf16 or integers
  kBf16,    // rounded to nearest even
  kInt8,    // codes -127 … 127 and one f32 scale, as IntegerActivationRow of one group
  kF8E4M3,  // codes and one f32 scale, as quantize_f8e4m3
};
const char* row_format_name(RowFormat format);  // "exact", "bf16", "int8", "fp8"
Result<RowFormat> parse_row_format(std::string_view name);

// Rows that Ops::encode_expert_rows has written: kU8 [T, Ops::expert_row_bytes].
struct EncodedRows {
  Tensor rows;
  RowFormat format = RowFormat::kExact;
};

enum class RouterScoring : uint8_t { kSoftmax, kSigmoid };

// Top-k expert choice (DeepSeek-V3 "noaux_tc" and softmax routers). All in f32:
//  s = softmax(logits) or sigmoid(logits); b = s + bias (if any); with num_groups > 1 only the `top_groups` best groups
//  stay, a group's score being the sum of its two largest b; the `top_k` largest b are chosen, ties to the lowest
//  index; weights are s of the chosen, divided by (their sum + 1e-20 for sigmoid) if `normalize`, times `scale`.
// Slots are ordered by descending b (ties: lower index first).
struct RouterParams {
  RouterScoring scoring = RouterScoring::kSoftmax;
  int64_t top_k = 1;
  int64_t num_groups = 1;
  int64_t top_groups = 1;
  bool normalize = true;
  float scale = 1.0F;
};

// Some rows of one sequence inside a step: row first_row + i is the token at position first_position + i, for
// i < num_rows. `block_table` of length num_blocks lies at block_table_offset in the step's table (I32 block ids) and
// covers positions 0 … first_position + num_rows - 1.
struct SequenceRows {
  int32_t first_row = 0;
  int32_t num_rows = 0;
  int32_t first_position = 0;
  int32_t block_table_offset = 0;
  int32_t num_blocks = 0;
};

// One layer of the paged cache. Block b begins at base + b * block_stride_bytes. Elements are of `dtype`: kF32, kBf16,
// or kF8E4M3 with scales.
//  GQA block: for each kv head k, then v. Both lie as products of pairs read them (pair_index in shapes.h): k as
//   [head_dim / 2][block_size][2], the pair being two dimensions of a position; v as [block_size / 2][head_dim][2], the
//   pair being two positions. A last dimension or position without a partner lies as a plain row behind the pairs.
//   kF8E4M3: behind v follow block_size scales of k, then as many of v, f32.
//  MLA block: [block_size][latent_dim + rope_dim] (normed latent, then rotated k_pe).
//   kF8E4M3: k_pe stays bf16, since its rounding costs most of the quality; behind the rows follow block_size scales of
//   latents, f32.
// A scale belongs to one written vector: value = fp8 * scale, scale = its largest magnitude / 448 (quantize_f8e4m3 in
// convert.h); it is NaN where the vector holds a NaN or an infinity.
struct KvLayerView {
  std::byte* base = nullptr;
  int64_t block_stride_bytes = 0;
  int64_t block_size = 0;
  int64_t num_blocks = 0;
  DType dtype = DType::kBf16;
};

class Ops {
 public:
  virtual ~Ops() = default;

  // "ref", "cpu-avx2", "cpu-avx512", "cpu-avx512-vnni", "cpu-avx512-bf16".
  virtual std::string name() const = 0;
  virtual int num_threads() const = 0;
  virtual DType activation_dtype() const = 0;

  virtual std::unique_ptr<Buffer> allocate(int64_t bytes) = 0;
  // As allocate(); where the device allows it, other processes of this host can map the buffer.
  virtual std::unique_ptr<Buffer> allocate_shareable(int64_t bytes) { return allocate(bytes); }
  // Maps what another process of this host has from its allocate_shareable() of as many bytes: `descriptor` is
  // shared_fd() there. The memory lives as long as one of them has it. Errors: there is no such memory, kUnsupported.
  virtual Result<std::unique_ptr<Buffer>> open_shared(int64_t process, int descriptor, int64_t bytes) {
    return make_error(ErrorKind::kUnsupported, "memory {} of process {}, {} bytes: {} cannot map another process's",
                      descriptor, process, bytes, name());
  }
  virtual std::unique_ptr<Stream> make_stream() = 0;
  virtual void upload(Stream& stream, std::byte* device_address, std::span<const std::byte> host) = 0;
  // Copies `bytes` from the device after everything enqueued before; blocks until done.
  virtual void read_back(Stream& stream, const std::byte* device_address, std::span<std::byte> host) = 0;
  virtual void synchronize(Stream& stream) = 0;

  // All matrices have the same n, k. The host data is not used after the call returns.
  virtual std::unique_ptr<Weight> pack_weight(std::span<const HostMatrix> matrices, const WeightFormat& format) = 0;

  // out[t] = table[ids[t]] ; ids I32 [T, 1], table: weight packed with pack_weight (batch 1, n = vocab, k = H).
  virtual void embed(Stream& stream, const Weight& table, const Tensor& ids, const Tensor& out) = 0;

  // Root-mean-square norm of each run of weight.cols columns: x is [T, s * weight.cols], out likewise (may alias x);
  // y = x / sqrt(mean(x²) + eps) * weight. weight is f32 [1, cols].
  virtual void rms_norm(Stream& stream, const Tensor& x, const Tensor& weight, float eps, const Tensor& out) = 0;
  // residual += delta, then out = rms_norm(residual).
  virtual void add_rms_norm(Stream& stream, const Tensor& residual, const Tensor& delta, const Tensor& weight,
                            float eps, const Tensor& out) = 0;
  // x += y.
  virtual void add(Stream& stream, const Tensor& x, const Tensor& y) = 0;

  // out[t] = x[t] · Wᵀ : x [T, k], out [T, n] (f32 or activation dtype). batch must be 1.
  virtual void linear(Stream& stream, const Tensor& x, const Weight& weight, const Tensor& out) = 0;
  // linear of the same x with several weights of one k: outs[i] = x · weights[i]ᵀ. The bits are those of linear; the
  // threads meet once instead of once per weight.
  virtual void linears(Stream& stream, const Tensor& x, std::span<const Weight* const> weights,
                       std::span<const Tensor> outs) = 0;
  // Per head h < batch: out[t, h, :] = x[t, h, :] · W[h]ᵀ; head h of x begins at column h * x_head_stride and of out
  // at column h * out_head_stride (MLA absorption).
  virtual void head_linear(Stream& stream, const Tensor& x, int64_t x_head_stride, const Weight& weight,
                           const Tensor& out, int64_t out_head_stride) = 0;

  // Rotates, in place, `dim` columns of each of `heads` heads; head h's columns begin at h * head_stride.
  // positions I32 [T, 1]; table f32 [max_position, dim]: cos of the dim/2 frequencies, then sin (factors included).
  // interleaved pairs (2i, 2i+1), otherwise (i, i + dim/2).
  virtual void rope(Stream& stream, const Tensor& x, int64_t heads, int64_t head_stride, int64_t dim,
                    const Tensor& positions, const Tensor& table, bool interleaved) = 0;

  // Writes row t of k and v [T, kv_heads * head_dim] to slot slots[t] = block * block_size + offset (I64 [T, 1]).
  virtual void write_kv(Stream& stream, const Tensor& k, const Tensor& v, int64_t kv_heads, const Tensor& slots,
                        const KvLayerView& cache) = 0;
  // Writes row t of latent [T, L] and k_pe [T, R] side by side to slot slots[t] of an MLA cache.
  virtual void write_latent(Stream& stream, const Tensor& latent, const Tensor& k_pe, const Tensor& slots,
                            const KvLayerView& cache) = 0;

  // Causal attention of grouped query heads over a paged cache.
  // q [T, q_heads * head_dim], out likewise; block_table I32 [total, 1]; `sequences` is host memory, read at once.
  // Row at position p sees positions 0 … p, its own KV being in the cache already.
  virtual void attention(Stream& stream, const Tensor& q, int64_t q_heads, int64_t kv_heads, float scale,
                         std::span<const SequenceRows> sequences, const Tensor& block_table, const KvLayerView& cache,
                         const Tensor& out) = 0;

  // MLA, absorbed form. q_latent [T, heads * L], q_pe [T, (heads - 1) * q_pe_head_stride + R]: head h's R columns begin
  // at h * q_pe_head_stride (so a col_slice of the queries up to their last column fits);
  // out [T, heads * L]: Σ_t p_t · latent_t with p = softmax(scale · (q_latent·latent_t + q_pe·k_pe_t)).
  virtual void mla_attention_absorbed(Stream& stream, const Tensor& q_latent, const Tensor& q_pe,
                                      int64_t q_pe_head_stride, int64_t heads, float scale,
                                      std::span<const SequenceRows> sequences, const Tensor& block_table,
                                      const KvLayerView& cache, const Tensor& out) = 0;

  // Copies positions 0 … latent.rows - 1 of one sequence out of an MLA cache: latent [n, L], k_pe [n, R].
  virtual void gather_latent(Stream& stream, const SequenceRows& sequence, const Tensor& block_table,
                             const KvLayerView& cache, const Tensor& latent, const Tensor& k_pe) = 0;
  // MLA, expanded form, for one sequence. q [T', heads * (N + R)] (per head: nope then rotated pe), where row i is at
  // position first_position + i; kv [n, heads * (N + V)] (per head: k_nope then v, the output of kv_b), k_pe [n, R],
  // n = first_position + T'. out [T', heads * V]. `cache_dtype` is that of the cache behind the latents: unless it is
  // kF32, a backend may round q, kv and k_pe to bf16.
  virtual void mla_attention_expanded(Stream& stream, const Tensor& q, const Tensor& kv, const Tensor& k_pe,
                                      int64_t heads, int64_t nope_dim, int64_t value_dim, float scale,
                                      int64_t first_position, DType cache_dtype, const Tensor& out) = 0;

  // out = silu(gate) * up with gate_up [T, 2 * I] holding gate first; out [T, I].
  virtual void silu_mul(Stream& stream, const Tensor& gate_up, const Tensor& out) = 0;

  // logits f32 [T, E]; bias f32 [1, E] or an empty Tensor; ids I32 [T, top_k]; weights f32 [T, top_k].
  virtual void route(Stream& stream, const Tensor& logits, const Tensor& bias, const RouterParams& params,
                     const Tensor& ids, const Tensor& weights) = 0;
  // Groups the T * top_k slots by expert: order I32 [T * top_k, 1] lists slots (t * top_k + j) by expert, ascending
  // inside one; offsets I32 [experts + 1, 1] says where each expert begins. A slot with the id -1 is nobody's: `order`
  // has offsets[experts] entries, what stands behind them has no meaning.
  virtual void sort_by_expert(Stream& stream, const Tensor& ids, int64_t experts, const Tensor& order,
                              const Tensor& offsets) = 0;
  // out[slot] = down_e( silu(gate_e(x)) * up_e(x) ) for every slot in `order`, x = row slot / top_k of x [T, H].
  // gate_up: batch E, n = 2 I (gate rows first), k = H; down: batch E, n = H, k = I; out [T * top_k, H]. Rows of x and
  // out that no slot in `order` names are not touched.
  virtual void expert_mlp(Stream& stream, const Tensor& x, const Tensor& order, const Tensor& offsets, int64_t top_k,
                          const Weight& gate_up, const Weight& down, const Tensor& out) = 0;
  // Bytes of a row of `k` columns on its way to experts whose gate_up has `weights`; a multiple of 64. Ranks that send
  // each other rows must run the same backend: kExact is its own.
  virtual int64_t expert_row_bytes(RowFormat format, const WeightFormat& weights, int64_t k) const = 0;
  // x [T, k] to out.rows, kU8 [T, expert_row_bytes], address and stride multiples of 4.
  virtual void encode_expert_rows(Stream& stream, const Tensor& x, const WeightFormat& weights,
                                  const EncodedRows& out) = 0;
  // expert_mlp of encoded rows. With kExact it has the bits of expert_mlp of the rows before they were encoded. The
  // output of the place p in `order` goes to the H floats at out + targets[p], a count of floats that may be negative:
  // outputs go wherever the device reaches. order and targets: [places, 1], I32 and I64, places >= offsets[E].
  virtual void expert_mlp_encoded(Stream& stream, const EncodedRows& x, const Tensor& order, const Tensor& offsets,
                                  int64_t top_k, const Weight& gate_up, const Weight& down, float* out,
                                  const Tensor& targets) = 0;
  // out[t] = Σ_j weights[t, j] * expert_out[t * top_k + j], f32, in the order of j. out [T, H].
  virtual void combine(Stream& stream, const Tensor& expert_out, const Tensor& weights, const Tensor& out) = 0;

  // out[i] = x[indices[i]]; indices I32 [n, 1].
  virtual void gather_rows(Stream& stream, const Tensor& x, const Tensor& indices, const Tensor& out) = 0;
};

// The backends this machine can run, best first, by name; "ref" is always the last.
std::vector<std::string> available_backends();
// `name` as in Ops::name(), or "auto" for the best. An unknown or impossible name is an error that lists the possible.
// `num_threads` 0 means one per core that this process may use (cores, not their hardware threads).
Result<std::unique_ptr<Ops>> make_ops(std::string_view name, int num_threads);

}  // namespace tandem::kernels
