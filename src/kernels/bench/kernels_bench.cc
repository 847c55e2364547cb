#include "src/kernels/bench/kernels_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <vector>

#include "src/kernels/bench/limits.h"
#include "src/kernels/convert.h"
#include "src/kernels/cpu/isa_choice.h"
#include "src/kernels/ops.h"
#include "src/kernels/shapes.h"

namespace tandem::kernels {
namespace {

constexpr int64_t kCacheBytes = int64_t{256} << 20;  // more than any cache
constexpr int64_t kRowCalls = 50;                    // of the small kernels, per run

// bf16, then what --quantization w8a8, wint8, w4a8 and wint4 with groups make.
constexpr WeightFormat kFormats[] = {kBf16Weights,
                                     {WeightType::kInt8, 0, 8},
                                     {WeightType::kInt8, 0, 16},
                                     {WeightType::kInt4, 128, 8},
                                     {WeightType::kInt4, 128, 16}};

// Rates of the plain backend in 1e9 operations per second, by kernel and format.
using ReferenceRates = std::map<std::string, double>;

// "linear int8 a8 M=1 N=4096 K=2048" is of "linear int8 a8".
std::string kernel_and_format(const std::string& line_name) {
  return line_name.substr(0, line_name.rfind(' ', line_name.find('=')));
}

class Bench {
 public:
  Bench(const cpu::Isa& isa, std::unique_ptr<Ops> ops, std::string filter)
      : ops_(std::move(ops)),
        filter_(std::move(filter)),
        stream_(ops_->make_stream()),
        meter_(isa, ops_->num_threads()) {}

  // Every line is one kernel with one shape: add lines here.
  void run_all(const ReferenceRates& reference);
  KernelsBenchNames take_names() { return std::move(names_); }
  // One small shape of every kernel and format, for the plain backend, which would take minutes for the others. Prints
  // nothing.
  ReferenceRates run_small();

 private:
  // Whether the line of that name is asked for; a line asks before it prepares anything.
  bool is_selected(const std::string& name) {
    const bool is_one = name.find(filter_) != std::string::npos;
    names_.all.push_back(name);
    names_.has_selected |= is_one;
    return is_one;
  }
  // Measures and prints a line; frees what make() made.
  void report(const BenchWork& work, const std::function<void()>& run);
  // How often a working set must be repeated, so that its copies together do not fit in the caches.
  int64_t copies_beyond_caches(int64_t bytes) const;
  Tensor make(DType dtype, int64_t rows, int64_t cols);
  Tensor make_random(int64_t rows, int64_t cols);
  std::unique_ptr<Weight> make_weight(int64_t batch, int64_t n, int64_t k, const WeightFormat& format);

  void bench_linear(const WeightFormat& format, int64_t rows, int64_t n, int64_t k);
  void bench_experts(const WeightFormat& format, int64_t rows, int64_t experts, int64_t top_k, int64_t hidden,
                     int64_t width);
  void bench_attention(DType cache, int64_t rows, int64_t positions, int64_t q_heads, int64_t kv_heads, int64_t dim);
  void bench_latent_attention(DType cache, int64_t positions, int64_t heads, int64_t latent, int64_t rope);
  void bench_expanded_attention(int64_t rows, int64_t positions, int64_t heads);
  // What stands between the products; `rows` of a step.
  void bench_norms(int64_t rows, int64_t hidden);
  void bench_rope_and_write(DType cache, int64_t rows, int64_t q_heads, int64_t kv_heads, int64_t dim);
  void bench_router(int64_t rows, int64_t experts, int64_t top_k);
  void bench_combine(int64_t rows, int64_t top_k, int64_t hidden);

  std::unique_ptr<Ops> ops_;
  const std::string filter_;
  KernelsBenchNames names_;
  bool is_small_ = false;
  ReferenceRates rates_;  // filled by run_small, compared with by run_all
  std::unique_ptr<Stream> stream_;
  LimitMeter meter_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::mt19937 random_{1};
};

void Bench::report(const BenchWork& work, const std::function<void()>& run) {
  const Rates rates = measure_beside_limits(meter_, run, work.ops, work.bytes, work.of_bytes);
  const std::string kind = kernel_and_format(work.name);
  buffers_.clear();
  // Lines without operations are compared by bytes.
  const double rate = work.ops == 0 ? rates.gbytes : rates.gops;
  if (is_small_) {
    rates_[kind] = rate;
    return;
  }
  const auto reference = rates_.find(kind);
  print_bench_line(work, rates,
                   reference == rates_.end() ? "no reference" : fmt::format("{:.0f} x ref", rate / reference->second));
}

Tensor Bench::make(DType dtype, int64_t rows, int64_t cols) {
  buffers_.push_back(ops_->allocate(rows * cols * dtype_bytes(dtype)));
  return Tensor{buffers_.back()->address(), dtype, rows, cols, cols};
}

Tensor Bench::make_random(int64_t rows, int64_t cols) {
  const Tensor tensor = make(DType::kF32, rows, cols);
  std::vector<float> values(static_cast<size_t>(rows * cols));
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(random_);
  ops_->upload(*stream_, tensor.address, std::as_bytes(std::span(values)));
  return tensor;
}

std::unique_ptr<Weight> Bench::make_weight(int64_t batch, int64_t n, int64_t k, const WeightFormat& format) {
  std::vector<uint16_t> values(static_cast<size_t>(n * k));
  std::uniform_real_distribution<float> uniform(-0.1F, 0.1F);
  for (uint16_t& value : values) value = bf16_from_float(uniform(random_));
  const HostMatrix matrix{.data = reinterpret_cast<const std::byte*>(values.data()), .n = n, .k = k};
  const std::vector<HostMatrix> matrices(static_cast<size_t>(batch), matrix);
  return ops_->pack_weight(matrices, format);
}

int64_t Bench::copies_beyond_caches(int64_t bytes) const { return is_small_ ? 1 : (kCacheBytes + bytes - 1) / bytes; }

void Bench::bench_linear(const WeightFormat& format, int64_t rows, int64_t n, int64_t k) {
  const std::string name = fmt::format("linear {} M={} N={} K={}", weight_format_name(format), rows, n, k);
  if (!is_selected(name)) return;
  std::vector<std::unique_ptr<Weight>> weights;
  weights.push_back(make_weight(1, n, k, format));
  const int64_t weight_bytes = weights[0]->bytes();
  const int64_t copies = rows == 1 ? copies_beyond_caches(weight_bytes) : 1;
  while (std::ssize(weights) < copies) weights.push_back(make_weight(1, n, k, format));
  const Tensor x = make_random(rows, k);
  const Tensor out = make(DType::kF32, rows, n);
  const BenchWork work{.name = name,
                       .calls = copies,
                       .ops = 2.0 * static_cast<double>(copies * n * k * rows),
                       .bytes = static_cast<double>(copies * weight_bytes),
                       .of_bytes = format.is_integer(),
                       .products_per_op = format.activation_bits == 16 ? 2 : 1};
  report(work, [&] {
    for (const std::unique_ptr<Weight>& weight : weights) ops_->linear(*stream_, x, *weight, out);
  });
}

void Bench::bench_experts(const WeightFormat& format, int64_t rows, int64_t experts, int64_t top_k, int64_t hidden,
                          int64_t width) {
  const std::string name = fmt::format("expert_mlp {} M={} E={} k={} H={} I={}", weight_format_name(format), rows,
                                       experts, top_k, hidden, width);
  if (!is_selected(name)) return;
  const std::unique_ptr<Weight> gate_up = make_weight(experts, 2 * width, hidden, format);
  const std::unique_ptr<Weight> down = make_weight(experts, hidden, width, format);
  const Tensor x = make_random(rows, hidden);
  const Tensor out = make(DType::kF32, rows * top_k, hidden);
  const int64_t steps = rows == 1 ? experts / top_k : 1;  // one after another, all experts are read
  std::vector<Tensor> orders;
  std::vector<Tensor> offsets;
  for (int64_t step = 0; step < steps; ++step) {
    std::vector<int32_t> ids;
    for (int64_t slot = 0; slot < rows * top_k; ++slot) {
      ids.push_back(static_cast<int32_t>((step * top_k + slot) % experts));
    }
    const Tensor ids_tensor = make(DType::kI32, rows, top_k);
    ops_->upload(*stream_, ids_tensor.address, std::as_bytes(std::span(ids)));
    orders.push_back(make(DType::kI32, rows * top_k, 1));
    offsets.push_back(make(DType::kI32, experts + 1, 1));
    ops_->sort_by_expert(*stream_, ids_tensor, experts, orders.back(), offsets.back());
  }
  const double weights_per_expert = static_cast<double>(3 * hidden * width);
  const double bytes_per_expert = static_cast<double>(gate_up->bytes() + down->bytes()) / static_cast<double>(experts);
  const double used = static_cast<double>(steps * std::min(experts, rows * top_k));
  const BenchWork work{.name = name,
                       .calls = steps,
                       .ops = 2.0 * weights_per_expert * static_cast<double>(steps * rows * top_k),
                       .bytes = bytes_per_expert * used,
                       .of_bytes = format.is_integer(),
                       .products_per_op = format.activation_bits == 16 ? 2 : 1};
  report(work, [&] {
    for (size_t step = 0; step < orders.size(); ++step) {
      ops_->expert_mlp(*stream_, x, orders[step], offsets[step], top_k, *gate_up, *down, out);
    }
  });
}

// What the name of a line says of the cache's type.
const char* cache_tag(DType dtype) { return dtype == DType::kF8E4M3 ? "fp8 " : ""; }

void Bench::bench_attention(DType dtype, int64_t rows, int64_t positions, int64_t q_heads, int64_t kv_heads,
                            int64_t dim) {
  const std::string name = fmt::format("attention {}rows={} of {} heads={}/{} d={}", cache_tag(dtype), rows, positions,
                                       q_heads, kv_heads, dim);
  if (!is_selected(name)) return;
  constexpr int64_t kBlock = 16;
  const int64_t blocks = (positions + kBlock - 1) / kBlock;
  const int64_t block_bytes = 2 * kv_heads * kBlock * cached_vector_bytes(dtype, dim);
  const int64_t copies = rows == 1 ? copies_beyond_caches(blocks * block_bytes) : 1;
  const std::unique_ptr<Buffer> memory = ops_->allocate(copies * blocks * block_bytes);
  const KvLayerView cache{memory->address(), block_bytes, kBlock, copies * blocks, dtype};
  const Tensor kv = make_random(kBlock, kv_heads * dim);
  for (int64_t block = 0; block < copies * blocks; ++block) {
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < kBlock; ++i) slots.push_back(block * kBlock + i);
    const Tensor column{reinterpret_cast<std::byte*>(slots.data()), DType::kI64, kBlock, 1, 1};
    ops_->write_kv(*stream_, kv, kv, kv_heads, column, cache);
  }
  std::vector<int32_t> table(static_cast<size_t>(copies * blocks));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  const Tensor block_table = make(DType::kI32, copies * blocks, 1);
  ops_->upload(*stream_, block_table.address, std::as_bytes(std::span(table)));
  const Tensor q = make_random(rows, q_heads * dim);
  const Tensor out = make(DType::kF32, rows, q_heads * dim);
  const double seen = static_cast<double>(rows) * (static_cast<double>(positions) - static_cast<double>(rows - 1) / 2);
  const BenchWork work{.name = name,
                       .calls = copies,
                       .ops = static_cast<double>(copies * 4 * q_heads * dim) * seen,
                       .bytes = static_cast<double>(copies * blocks * block_bytes)};
  report(work, [&] {
    for (int64_t copy = 0; copy < copies; ++copy) {
      const SequenceRows sequence{0, static_cast<int32_t>(rows), static_cast<int32_t>(positions - rows),
                                  static_cast<int32_t>(copy * blocks), static_cast<int32_t>(blocks)};
      ops_->attention(*stream_, q, q_heads, kv_heads, 0.1F, std::span(&sequence, 1), block_table, cache, out);
    }
  });
}

void Bench::bench_latent_attention(DType dtype, int64_t positions, int64_t heads, int64_t latent, int64_t rope) {
  const std::string name =
      fmt::format("mla absorbed {}rows=1 of {} heads={} {}+{}", cache_tag(dtype), positions, heads, latent, rope);
  if (!is_selected(name)) return;
  constexpr int64_t kBlock = 16;
  const int64_t blocks = (positions + kBlock - 1) / kBlock;
  const int64_t block_bytes = kBlock * cached_latent_bytes(dtype, latent, rope);
  const int64_t copies = copies_beyond_caches(blocks * block_bytes);
  const std::unique_ptr<Buffer> memory = ops_->allocate(copies * blocks * block_bytes);  // zeros are as fast as others
  const KvLayerView cache{memory->address(), block_bytes, kBlock, copies * blocks, dtype};
  std::fill_n(memory->address(), copies * blocks * block_bytes, std::byte{0x3C});
  std::vector<int32_t> table(static_cast<size_t>(copies * blocks));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  const Tensor block_table = make(DType::kI32, copies * blocks, 1);
  ops_->upload(*stream_, block_table.address, std::as_bytes(std::span(table)));
  const Tensor q_latent = make_random(1, heads * latent);
  const Tensor q_pe = make_random(1, heads * rope);
  const Tensor out = make(DType::kF32, 1, heads * latent);
  const BenchWork work{.name = name,
                       .calls = copies,
                       .ops = static_cast<double>(copies * positions * heads * 2 * (2 * latent + rope)),
                       .bytes = static_cast<double>(copies * blocks * block_bytes)};
  report(work, [&] {
    for (int64_t copy = 0; copy < copies; ++copy) {
      const SequenceRows sequence{0, 1, static_cast<int32_t>(positions - 1), static_cast<int32_t>(copy * blocks),
                                  static_cast<int32_t>(blocks)};
      ops_->mla_attention_absorbed(*stream_, q_latent, q_pe, rope, heads, 0.1F, std::span(&sequence, 1), block_table,
                                   cache, out);
    }
  });
}

void Bench::bench_expanded_attention(int64_t rows, int64_t positions, int64_t heads) {
  constexpr int64_t kNope = 128, kRope = 64, kValue = 128;
  const std::string name =
      fmt::format("mla expanded rows={} of {} heads={} {}+{}/{}", rows, positions, heads, kNope, kRope, kValue);
  if (!is_selected(name)) return;
  const Tensor q = make_random(rows, heads * (kNope + kRope));
  const Tensor kv = make_random(positions, heads * (kNope + kValue));
  const Tensor k_pe = make_random(positions, kRope);
  const Tensor out = make(DType::kF32, rows, heads * kValue);
  const double seen = static_cast<double>(rows) * (static_cast<double>(positions) - static_cast<double>(rows - 1) / 2);
  const BenchWork work{.name = name,
                       .ops = static_cast<double>(heads * 2 * (kNope + kRope + kValue)) * seen,
                       .bytes = static_cast<double>(kv.bytes() + k_pe.bytes())};
  report(work, [&] {
    ops_->mla_attention_expanded(*stream_, q, kv, k_pe, heads, kNope, kValue, 0.07F, positions - rows, DType::kBf16,
                                 out);
  });
}

// These lines use the same rows again and again. In a step, too, rows come out of the caches as far as they fit: those
// of one token do, those of a large step do not. Hence shares above 100 % of what memory gives.
void Bench::bench_norms(int64_t rows, int64_t hidden) {
  const std::string shape = fmt::format("rows={} H={}", rows, hidden);
  const double row_bytes = static_cast<double>(rows * hidden) * sizeof(float);
  for (const bool adds : {false, true}) {
    const std::string name = (adds ? "add_rms_norm " : "rms_norm ") + shape;
    if (!is_selected(name)) continue;
    const Tensor residual = make_random(rows, hidden);
    const Tensor delta = make_random(rows, hidden);
    const Tensor weight = make_random(1, hidden);
    const Tensor out = make(DType::kF32, rows, hidden);
    const BenchWork work{.name = name, .calls = kRowCalls, .bytes = (adds ? 4 : 2) * row_bytes * kRowCalls};
    report(work, [&] {
      for (int64_t call = 0; call < kRowCalls; ++call) {
        if (adds) {
          ops_->add_rms_norm(*stream_, residual, delta, weight, 1e-6F, out);
        } else {
          ops_->rms_norm(*stream_, residual, weight, 1e-6F, out);
        }
      }
    });
  }
}

void Bench::bench_rope_and_write(DType dtype, int64_t rows, int64_t q_heads, int64_t kv_heads, int64_t dim) {
  const std::string name =
      fmt::format("rope+write_kv {}rows={} heads={}/{} d={}", cache_tag(dtype), rows, q_heads, kv_heads, dim);
  if (!is_selected(name)) return;
  constexpr int64_t kBlock = 16;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  const int64_t block_bytes = 2 * kv_heads * kBlock * cached_vector_bytes(dtype, dim);
  const std::unique_ptr<Buffer> memory = ops_->allocate(blocks * block_bytes);
  const KvLayerView cache{memory->address(), block_bytes, kBlock, blocks, dtype};
  const Tensor q = make_random(rows, q_heads * dim);
  const Tensor k = make_random(rows, kv_heads * dim);
  const Tensor v = make_random(rows, kv_heads * dim);
  const Tensor table = make_random(rows, dim);
  const Tensor positions = make(DType::kI32, rows, 1);
  const Tensor slots = make(DType::kI64, rows, 1);
  std::vector<int32_t> position_values;
  std::vector<int64_t> slot_values;
  for (int64_t row = 0; row < rows; ++row) {
    position_values.push_back(static_cast<int32_t>(row));
    slot_values.push_back(row);
  }
  ops_->upload(*stream_, positions.address, std::as_bytes(std::span(position_values)));
  ops_->upload(*stream_, slots.address, std::as_bytes(std::span(slot_values)));
  // q and k are read and written, k and v read once more; the cache is written.
  const int64_t floats = rows * dim * (2 * q_heads + 4 * kv_heads) + table.rows * dim;
  const BenchWork work{
      .name = name,
      .calls = kRowCalls,
      .bytes = static_cast<double>(
          kRowCalls * (floats * int64_t{sizeof(float)} + 2 * rows * kv_heads * cached_vector_bytes(dtype, dim)))};
  report(work, [&] {
    for (int64_t call = 0; call < kRowCalls; ++call) {
      ops_->rope(*stream_, q, q_heads, dim, dim, positions, table, false);
      ops_->rope(*stream_, k, kv_heads, dim, dim, positions, table, false);
      ops_->write_kv(*stream_, k, v, kv_heads, slots, cache);
    }
  });
}

void Bench::bench_router(int64_t rows, int64_t experts, int64_t top_k) {
  const std::string name = fmt::format("route+sort rows={} E={} k={}", rows, experts, top_k);
  if (!is_selected(name)) return;
  const Tensor logits = make_random(rows, experts);
  const Tensor ids = make(DType::kI32, rows, top_k);
  const Tensor weights = make(DType::kF32, rows, top_k);
  const Tensor order = make(DType::kI32, rows * top_k, 1);
  const Tensor offsets = make(DType::kI32, experts + 1, 1);
  const RouterParams params{.top_k = top_k};
  const BenchWork work{.name = name,
                       .calls = kRowCalls,
                       .bytes = static_cast<double>(kRowCalls * rows * (experts + 3 * top_k)) * sizeof(float)};
  report(work, [&] {
    for (int64_t call = 0; call < kRowCalls; ++call) {
      ops_->route(*stream_, logits, Tensor{}, params, ids, weights);
      ops_->sort_by_expert(*stream_, ids, experts, order, offsets);
    }
  });
}

void Bench::bench_combine(int64_t rows, int64_t top_k, int64_t hidden) {
  const std::string name = fmt::format("combine rows={} k={} H={}", rows, top_k, hidden);
  if (!is_selected(name)) return;
  const Tensor terms = make_random(rows * top_k, hidden);
  const Tensor weights = make_random(rows, top_k);
  const Tensor out = make(DType::kF32, rows, hidden);
  const BenchWork work{.name = name,
                       .calls = kRowCalls,
                       .bytes = static_cast<double>(kRowCalls * rows * (top_k + 1) * hidden) * sizeof(float)};
  report(work, [&] {
    for (int64_t call = 0; call < kRowCalls; ++call) ops_->combine(*stream_, terms, weights, out);
  });
}

ReferenceRates Bench::run_small() {
  is_small_ = true;
  for (const WeightFormat& format : kFormats) {
    bench_linear(format, 8, 256, 512);
    bench_experts(format, 8, 8, 2, 256, 128);
  }
  for (const DType cache : {DType::kBf16, DType::kF8E4M3}) {
    bench_attention(cache, 16, 256, 4, 2, 128);
    bench_latent_attention(cache, 256, 4, 512, 64);
  }
  bench_expanded_attention(16, 256, 4);
  bench_norms(16, 256);
  for (const DType cache : {DType::kBf16, DType::kF8E4M3}) bench_rope_and_write(cache, 16, 4, 2, 128);
  bench_router(16, 128, 8);
  bench_combine(16, 8, 256);
  return std::move(rates_);
}

void Bench::run_all(const ReferenceRates& reference) {
  rates_ = reference;
  fmt::print(
      "{}, {} threads; shares are of f32 multiply-adds (integer formats: of products of bytes) and of memory "
      "reads, both measured before and after each run of the kernel; medians; /2: a16 takes two products of bytes for "
      "each weight, so its limit is half; lines without operations are bound by bytes read and written, or by what "
      "starting them costs; ref is the plain backend, one thread, at a small shape\n",
      ops_->name(), ops_->num_threads());
  for (const WeightFormat& format : kFormats) {
    for (const int64_t rows : {1, 4, 16, 64, 256}) bench_linear(format, rows, 4096, 2048);
    bench_linear(format, 1, 7168, 2048);
    bench_linear(format, 256, 2048, 7168);
    for (const int64_t rows : {1, 16, 256, 512}) bench_experts(format, rows, 128, 8, 2048, 768);
  }
  for (const DType cache : {DType::kBf16, DType::kF8E4M3}) {
    bench_attention(cache, 1, 8192, 32, 4, 128);
    bench_attention(cache, 1, 8192, 16, 16, 128);
    bench_attention(cache, 512, 512, 32, 4, 128);
    bench_attention(cache, 128, 4096, 32, 4, 128);
    bench_latent_attention(cache, 8192, 16, 512, 64);
  }
  bench_expanded_attention(512, 512, 16);
  bench_expanded_attention(128, 4096, 16);
  for (const int64_t rows : {1, 512}) {
    bench_norms(rows, 2048);
    for (const DType cache : {DType::kBf16, DType::kF8E4M3}) bench_rope_and_write(cache, rows, 32, 4, 128);
    bench_router(rows, 128, 8);
    bench_combine(rows, 8, 2048);
  }
}

Result<KernelsBenchNames> run_one_isa(const std::string& name, const KernelsBenchOptions& options) {
  TANDEM_ASSIGN(std::unique_ptr<Ops> ops, make_ops(name, options.threads));
  const cpu::Isa* isa = cpu::find_isa(ops->name());
  if (isa == nullptr) {
    return invalid_argument("cpu-isa", "backend \"{}\" has no limits to compare with, choose one of the cpu backends",
                            name);
  }
  TANDEM_ASSIGN(std::unique_ptr<Ops> ref_ops, make_ops("ref", 1));
  const ReferenceRates reference = Bench(*isa, std::move(ref_ops), options.filter).run_small();
  Bench bench(*isa, std::move(ops), options.filter);
  bench.run_all(reference);
  return bench.take_names();
}

}  // namespace

void print_bench_line(const BenchWork& work, const Rates& rates, const std::string& note) {
  std::string operations(39, ' ');
  if (work.ops > 0) {
    const double factor = static_cast<double>(work.products_per_op);
    operations = fmt::format("{:>8.1f} {} ({:>3.0f} % of {:>6.1f}{})", rates.gops,
                             work.of_bytes ? "GOP/s  " : "GFLOP/s", 100 * factor * rates.ops_share,
                             rates.limit_gops / factor, work.products_per_op == 1 ? "   " : " /2");
  }
  fmt::print("{:<46} {:>10.1f} us {} {:>7.1f} GB/s ({:>3.0f} % of {:>5.1f}) {:>10}\n", work.name,
             rates.seconds * 1e6 / static_cast<double>(work.calls), operations, rates.gbytes, 100 * rates.bytes_share,
             rates.limit_gbytes, note);
  std::fflush(stdout);
}

Result<KernelsBenchNames> run_kernels_bench(const KernelsBenchOptions& options) {
  if (options.isa != "all") return run_one_isa(options.isa, options);
  KernelsBenchNames names;  // the same for each
  for (const cpu::Isa* isa : cpu::possible_isas()) {
    TANDEM_ASSIGN(names, run_one_isa(isa->name, options));
  }
  return names;
}

}  // namespace tandem::kernels
