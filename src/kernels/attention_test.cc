// Attention over a paged cache: against the reference, and the same bits however the rows are cut into chunks. All of
// the cache that nobody wrote holds NaN.
#include <functional>

#include "src/kernels/shapes.h"
#include "src/kernels/test_support.h"

namespace tandem::kernels {
namespace {

// Of the largest output; caches hold the same bits on both sides.
constexpr float kTolerance = 5e-6F;
// Where queries and weights are rounded to bf16, to 1/256 of themselves, and a query's error grows with its scores.
constexpr float kPairTolerance = 2e-2F;

enum class Kind { kGqa, kMlaAbsorbed, kMlaExpanded };

struct Case {
  Kind kind;
  DType cache_dtype;
  int64_t heads;
  int64_t kv_heads;   // GQA
  int64_t dim;        // GQA: head; MLA: latent or nope
  int64_t rope_dim;   // MLA
  int64_t value_dim;  // MLA, expanded
  int64_t block_size;
};

constexpr Case kCases[] = {
    {Kind::kGqa, DType::kBf16, 4, 2, 32, 0, 0, 16},
    {Kind::kGqa, DType::kF32, 3, 3, 20, 0, 0, 8},
    {Kind::kGqa, DType::kBf16, 1, 1, 1, 0, 0, 3},
    {Kind::kGqa, DType::kBf16, 40, 1, 24, 0, 0, 32},
    {Kind::kMlaAbsorbed, DType::kBf16, 5, 0, 40, 8, 0, 16},
    {Kind::kMlaAbsorbed, DType::kF32, 33, 0, 16, 6, 0, 64},
    {Kind::kMlaExpanded, DType::kF32, 3, 0, 24, 8, 20, 16},
    {Kind::kMlaExpanded, DType::kBf16, 3, 0, 24, 8, 20, 16},
    {Kind::kGqa, DType::kBf16, 16, 2, 64, 0, 0, 16},
    {Kind::kGqa, DType::kBf16, 6, 2, 48, 0, 0, 48},
    {Kind::kGqa, DType::kF8E4M3, 16, 2, 64, 0, 0, 16},
    {Kind::kGqa, DType::kF8E4M3, 5, 5, 32, 0, 0, 32},
    {Kind::kGqa, DType::kF8E4M3, 3, 1, 7, 0, 0, 5},
    {Kind::kMlaAbsorbed, DType::kBf16, 9, 0, 48, 16, 0, 16},
    {Kind::kMlaAbsorbed, DType::kF8E4M3, 5, 0, 40, 8, 0, 16},
};

// One sequence's activations, in f32, by position.
struct Activations {
  Matrix<float> q;  // queries; for the absorbed form [latent of all heads, then pe of all heads]
  Matrix<float> k;  // keys; MLA: latent, or the kv activations of the expanded form
  Matrix<float> v;  // values; MLA: k_pe
};

// A chunk of one sequence inside a step.
struct Part {
  const Activations* sequence;
  int64_t first;
  int64_t count;
  int64_t base;  // which blocks the sequence uses
};

class AttentionRunner {
 public:
  AttentionRunner(const std::string& backend, const Case& config, int64_t max_positions, int64_t sequences, int threads)
      : device_(backend, threads), config_(config) {
    blocks_per_sequence_ = (max_positions + config.block_size - 1) / config.block_size;
    const int64_t num_blocks = sequences * blocks_per_sequence_;
    table_ = Random(77).permutation(num_blocks);
    const int64_t token_bytes = config.kind == Kind::kGqa
                                    ? 2 * config.kv_heads * cached_vector_bytes(config.cache_dtype, config.dim)
                                    : cached_latent_bytes(config.cache_dtype, config.dim, config.rope_dim);
    // 6: a gap that is NaN.
    const int64_t stride = config.block_size * token_bytes + 6 * dtype_bytes(config.cache_dtype);
    const Tensor memory = device_.make(DType::kU8, num_blocks, stride);
    cache_ = KvLayerView{memory.address, stride, config.block_size, num_blocks, config.cache_dtype};
  }

  // Writes the parts' keys and values, then attends; rows of all parts in order.
  Matrix<float> run(const std::vector<Part>& parts) {
    if (config_.kind == Kind::kMlaExpanded) return run_expanded(parts);
    Matrix<float> q;
    Matrix<float> k;
    Matrix<float> v;
    std::vector<int64_t> slots;
    std::vector<SequenceRows> sequences;
    for (const Part& part : parts) {
      sequences.push_back(SequenceRows{.first_row = static_cast<int32_t>(q.rows),
                                       .num_rows = static_cast<int32_t>(part.count),
                                       .first_position = static_cast<int32_t>(part.first),
                                       .block_table_offset = static_cast<int32_t>(part.base * blocks_per_sequence_),
                                       .num_blocks = static_cast<int32_t>(blocks_per_sequence_)});
      append(q, part.sequence->q.rows_slice(part.first, part.count));
      append(k, part.sequence->k.rows_slice(part.first, part.count));
      append(v, part.sequence->v.rows_slice(part.first, part.count));
      for (int64_t i = 0; i < part.count; ++i) {
        const int64_t position = part.first + i;
        const int64_t index = part.base * blocks_per_sequence_ + position / config_.block_size;
        slots.push_back(table_[static_cast<size_t>(index)] * config_.block_size + position % config_.block_size);
      }
    }
    const Tensor table = device_.put_column(table_);
    const Tensor q_tensor = device_.put(q, 3);
    Ops& ops = device_.ops();
    if (config_.kind == Kind::kGqa) {
      ops.write_kv(device_.stream(), device_.put(k), device_.put(v, 1), config_.kv_heads, device_.put_column(slots),
                   cache_);
      const Tensor out = device_.make_f32(q.rows, q.cols, 1);
      ops.attention(device_.stream(), q_tensor, config_.heads, config_.kv_heads, scale(), sequences, table, cache_,
                    out);
      return device_.get_f32(out);
    }
    const int64_t latent_cols = config_.heads * config_.dim;
    ops.write_latent(device_.stream(), device_.put(k), device_.put(v), device_.put_column(slots), cache_);
    const Tensor out = device_.make_f32(q.rows, latent_cols);
    ops.mla_attention_absorbed(device_.stream(), q_tensor.col_slice(0, latent_cols),
                               q_tensor.col_slice(latent_cols, q.cols - latent_cols), config_.rope_dim, config_.heads,
                               scale(), sequences, table, cache_, out);
    return device_.get_f32(out);
  }

  Device& device() { return device_; }
  const KvLayerView& cache() const { return cache_; }
  const std::vector<int32_t>& table() const { return table_; }

 private:
  static void append(Matrix<float>& matrix, const Matrix<float>& rows) {
    matrix.rows += rows.rows;
    matrix.cols = rows.cols;
    matrix.values.insert(matrix.values.end(), rows.values.begin(), rows.values.end());
  }
  float scale() const { return 1.0F / std::sqrt(static_cast<float>(config_.dim + config_.rope_dim)); }

  Matrix<float> run_expanded(const std::vector<Part>& parts) {
    Matrix<float> result;
    for (const Part& part : parts) {
      const int64_t positions = part.first + part.count;
      const Tensor out = device_.make_f32(part.count, config_.heads * config_.value_dim, 1);
      device_.ops().mla_attention_expanded(
          device_.stream(), device_.put(part.sequence->q.rows_slice(part.first, part.count), 1),
          device_.put(part.sequence->k.rows_slice(0, positions)),
          device_.put(part.sequence->v.rows_slice(0, positions), 2), config_.heads, config_.dim, config_.value_dim,
          scale(), part.first, config_.cache_dtype, out);
      append(result, device_.get_f32(out));
    }
    return result;
  }

  Device device_;
  Case config_;
  int64_t blocks_per_sequence_ = 0;
  std::vector<int32_t> table_;
  KvLayerView cache_;
};

Activations make_activations(Random& random, const Case& config, int64_t positions) {
  switch (config.kind) {
    case Kind::kGqa:
      return {random.matrix(positions, config.heads * config.dim, 2.0F),
              random.matrix(positions, config.kv_heads * config.dim),
              random.matrix(positions, config.kv_heads * config.dim)};
    case Kind::kMlaAbsorbed:
      return {random.matrix(positions, config.heads * (config.dim + config.rope_dim), 2.0F),
              random.matrix(positions, config.dim), random.matrix(positions, config.rope_dim)};
    case Kind::kMlaExpanded:
      return {random.matrix(positions, config.heads * (config.dim + config.rope_dim), 2.0F),
              random.matrix(positions, config.heads * (config.dim + config.value_dim)),
              random.matrix(positions, config.rope_dim)};
  }
  return {};
}

class AttentionTest : public BackendTest {
 protected:
  // The reference is slow, and its rows share nothing that a test of exactness could catch.
  bool is_slow(const Case& config) const { return name() == "ref" && config.heads > 1; }
  float tolerance(const Case& config) const {
    return name() == "cpu-avx512-bf16" && config.cache_dtype != DType::kF32 ? kPairTolerance : kTolerance;
  }
};

TEST_P(AttentionTest, AgreesWithTheReference) {
  Random random(21);
  for (const Case& config : kCases) {
    for (const int64_t positions : {1, 2, 9, 64, 65, 150}) {
      const Activations sequence = make_activations(random, config, positions);
      const std::vector<Part> parts{{&sequence, 0, positions, 0}};
      AttentionRunner runner(name(), config, positions, 1, 2);
      AttentionRunner reference("ref", config, positions, 1, 1);
      EXPECT_LE(relative_error(runner.run(parts), reference.run(parts)), tolerance(config))
          << positions << " positions, case " << &config - kCases;
    }
  }
}

TEST_P(AttentionTest, ChunksGiveTheSameBits) {
  Random random(22);
  constexpr int64_t kPositions = 600;  // past tiles of 64 and splits of 512
  for (const Case& config : kCases) {
    if (is_slow(config)) continue;
    const Activations sequence = make_activations(random, config, kPositions);
    AttentionRunner whole_runner(name(), config, kPositions, 1, 2);
    const Matrix<float> whole = whole_runner.run({{&sequence, 0, kPositions, 0}});
    for (const int64_t chunk : {1, 7, 64, 100}) {
      AttentionRunner runner(name(), config, kPositions, 1, 1);
      for (int64_t first = 0; first < kPositions; first += chunk) {
        const int64_t count = std::min(chunk, kPositions - first);
        ASSERT_TRUE(same_bits(runner.run({{&sequence, first, count, 0}}), whole.rows_slice(first, count)))
            << "chunk " << chunk << " at " << first << ", case " << &config - kCases;
      }
    }
  }
}

TEST_P(AttentionTest, CompanionsAndThreadsDoNotMatter) {
  Random random(23);
  const int64_t lengths[] = {700, 3, 130, 64, 520};
  for (const Case& config : kCases) {
    if (is_slow(config)) continue;
    std::vector<Activations> sequences;
    for (const int64_t length : lengths) sequences.push_back(make_activations(random, config, length));
    std::vector<Matrix<float>> alone;
    std::vector<Part> prompts;
    std::vector<Part> last_rows;
    for (size_t i = 0; i < sequences.size(); ++i) {
      const int64_t base = static_cast<int64_t>(i);
      prompts.push_back({&sequences[i], 0, lengths[i] - 1, base});
      last_rows.push_back({&sequences[i], lengths[i] - 1, 1, base});
      AttentionRunner runner(name(), config, 700, 1, 1);
      alone.push_back(runner.run({{&sequences[i], 0, lengths[i], 0}}));
    }
    for (const int threads : {1, 2, 3}) {
      // All prompts but the last row in one step, the last rows (a decode step) in another, one of them chunked.
      AttentionRunner runner(name(), config, 700, 5, threads);
      const Matrix<float> first = runner.run(prompts);
      const Matrix<float> second = runner.run(last_rows);
      int64_t row = 0;
      for (size_t i = 0; i < sequences.size(); ++i) {
        const int64_t count = lengths[i] - 1;
        EXPECT_TRUE(same_bits(first.rows_slice(row, count), alone[i].rows_slice(0, count))) << threads << " threads";
        EXPECT_TRUE(same_bits(second.rows_slice(static_cast<int64_t>(i), 1), alone[i].rows_slice(count, 1)))
            << threads << " threads, sequence of " << lengths[i];
        row += count;
      }
    }
  }
}

// One long row on several threads goes by splits with results in memory; it must equal the row in a chunk.
TEST_P(AttentionTest, LongRowsAreSplitWithoutATrace) {
  Random random(24);
  const Case config{Kind::kGqa, DType::kBf16, 2, 1, 16, 0, 0, 16};
  if (is_slow(config)) GTEST_SKIP() << "the reference does not split rows";
  constexpr int64_t kPositions = 2100;
  const Activations sequence = make_activations(random, config, kPositions);
  AttentionRunner one(name(), config, kPositions, 1, 1);
  const Matrix<float> filled = one.run({{&sequence, 0, kPositions - 40, 0}});
  const Matrix<float> chunk = one.run({{&sequence, kPositions - 40, 40, 0}});
  AttentionRunner two(name(), config, kPositions, 1, 3);
  two.run({{&sequence, 0, kPositions - 40, 0}});
  for (int64_t i = 0; i < 40; ++i) {
    EXPECT_TRUE(same_bits(two.run({{&sequence, kPositions - 40 + i, 1, 0}}), chunk.rows_slice(i, 1))) << i;
  }
}

// What a cache of `dtype` makes of a vector.
void round_as_cached(DType dtype, float* values, int64_t count) {
  if (dtype == DType::kBf16) {
    for (int64_t i = 0; i < count; ++i) values[i] = float_from_bf16(bf16_from_float(values[i]));
  } else if (dtype == DType::kF8E4M3) {
    std::vector<uint8_t> codes(static_cast<size_t>(count));
    const float scale = quantize_f8e4m3(values, count, codes.data());
    for (int64_t i = 0; i < count; ++i) values[i] = float_from_f8e4m3(codes[static_cast<size_t>(i)]) * scale;
  }
}

TEST_P(AttentionTest, GatherReturnsWhatWasWritten) {
  Random random(25);
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF8E4M3}) {
    const Case config{Kind::kMlaAbsorbed, dtype, 2, 0, 24, 10, 0, 16};
    Activations sequence = make_activations(random, config, 50);
    for (int64_t d = 0; d < 24; ++d) sequence.k.row(7)[d] *= std::exp2(-static_cast<float>(d));  // fp8's subnormals
    std::fill_n(sequence.k.row(8), 24, 0.0F);
    std::fill_n(sequence.v.row(8), 10, 0.0F);
    AttentionRunner runner(name(), config, 50, 1, 2);
    runner.run({{&sequence, 0, 50, 0}});
    Device& device = runner.device();
    const Tensor latent = device.make_f32(50, 24, 1);
    const Tensor k_pe = device.make_f32(50, 10);
    device.ops().gather_latent(device.stream(), SequenceRows{.num_rows = 1, .first_position = 49, .num_blocks = 4},
                               device.put_column(runner.table()), runner.cache(), latent, k_pe);
    Matrix<float> expected_latent = sequence.k;
    Matrix<float> expected_pe = sequence.v;
    for (int64_t t = 0; t < 50; ++t) {
      round_as_cached(dtype, expected_latent.row(t), 24);
      round_as_cached(dtype == DType::kF8E4M3 ? DType::kBf16 : dtype, expected_pe.row(t), 10);
    }
    EXPECT_TRUE(same_bits(device.get_f32(latent), expected_latent)) << dtype_name(dtype);
    EXPECT_TRUE(same_bits(device.get_f32(k_pe), expected_pe)) << dtype_name(dtype);
  }
}

// A backend writes the bytes that the reference writes: workers of different instruction sets may exchange blocks.
TEST_P(AttentionTest, CachesHoldTheSameBytes) {
  Random random(26);
  for (const Case& config : kCases) {
    if (config.kind == Kind::kMlaExpanded) continue;
    const Activations sequence = make_activations(random, config, 70);
    const auto write = [&](const std::string& backend) {
      AttentionRunner runner(backend, config, 70, 1, 2);
      runner.run({{&sequence, 0, 70, 0}});
      const KvLayerView& cache = runner.cache();
      const Tensor memory{cache.base, DType::kU8, cache.num_blocks, cache.block_stride_bytes, cache.block_stride_bytes};
      return runner.device().get<uint8_t>(memory);
    };
    EXPECT_TRUE(same_bits(write(name()), write("ref"))) << "case " << &config - kCases;
  }
}

// A NaN or an infinity spoils the rows that see its position, and no others.
TEST_P(AttentionTest, BadValuesInAnFp8CacheDoNotHide) {
  Random random(27);
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()};
  for (const float value : bad) {
    const Case config{Kind::kGqa, DType::kF8E4M3, 2, 1, 16, 0, 0, 16};
    Activations sequence = make_activations(random, config, 30);
    sequence.v.row(21)[3] = value;
    AttentionRunner runner(name(), config, 30, 1, 1);
    const Matrix<float> out = runner.run({{&sequence, 0, 30, 0}});
    for (int64_t t = 0; t < 30; ++t) EXPECT_EQ(std::isnan(out.at(t, 5)), t >= 21) << t;
  }
}

TANDEM_FOR_ALL_BACKENDS(AttentionTest);

}  // namespace
}  // namespace tandem::kernels
