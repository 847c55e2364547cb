// Sums over the tensor ranks, and whole models that are shared by some: against the sum in the order of the ranks, bit for
// bit, and against the model of one rank, within a tolerance, since its sums have another order.
#include "src/tp/tensor_windows.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <thread>

#include "src/group/test_support.h"
#include "src/kernels/test_support.h"
#include "src/model/device_tensor.h"
#include "src/model/test_support.h"

namespace tandem::tp {
namespace {

using group::RankId;
using kernels::DType;
using kernels::Tensor;
using model::DeviceTensor;
using testing::HasSubstr;

// Largest difference of logits, relative to the largest one.
constexpr double kF32Tolerance = 1e-4;
// Products with bf16 weights round their input, and another order of sums makes it fall to the other side now and then.
constexpr double kBf16Tolerance = 0.02;

class TestTensorRank {
 public:
  TestTensorRank(const std::string& backend, int32_t rank, int32_t size)
      : ops_(kernels::make_ops(backend, 1).value()), windows_({{rank, size}, RankId(0), 64}) {}
  kernels::Ops& ops() { return *ops_; }
  TensorWindows& windows() { return windows_; }

 private:
  std::unique_ptr<kernels::Ops> ops_;
  TensorWindows windows_;
};

std::vector<std::unique_ptr<TestTensorRank>> make_ranks(const std::string& backend, int32_t size) {
  std::vector<std::unique_ptr<TestTensorRank>> ranks;
  for (int32_t r = 0; r < size; ++r) ranks.push_back(std::make_unique<TestTensorRank>(backend, r, size));
  return ranks;
}

struct Summands {
  std::vector<kernels::Matrix<float>> of_ranks;
  kernels::Matrix<float> sum;
};

Summands make_summands(kernels::Random& random, int32_t ranks, int64_t rows, int64_t cols) {
  Summands summands{{}, kernels::Matrix<float>(rows, cols)};
  for (int32_t r = 0; r < ranks; ++r) summands.of_ranks.push_back(random.matrix(rows, cols));
  for (size_t i = 0; i < summands.sum.values.size(); ++i) {
    float sum = summands.of_ranks[0].values[i];
    for (size_t r = 1; r < summands.of_ranks.size(); ++r) sum += summands.of_ranks[r].values[i];
    summands.sum.values[i] = sum;
  }
  return summands;
}

TEST(TensorWindows, SumsAreThoseInTheOrderOfTheRanks) {
  kernels::Random random(61);
  constexpr int64_t kCols = 24;
  constexpr int64_t kMaxRows = 1500;  // several pieces
  for (const int32_t size : {1, 2, 3, 4, 7}) {
    std::vector<Summands> steps;
    for (const int64_t rows : {1, 2, 3, 5, 64, 511, 513, 1500, 1, 7}) {
      steps.push_back(make_summands(random, size, rows, kCols));
    }
    std::vector<std::unique_ptr<TestTensorRank>> ranks = make_ranks("ref", size);
    const model::TensorShape shape{kMaxRows, kCols, 4, 8};
    group::ThreadGroup group(size, 64 + ranks[0]->windows().extra_bytes(shape));
    group.run([&](group::Fabric& fabric) {
      TestTensorRank& rank = *ranks[static_cast<size_t>(fabric.rank().value)];
      const std::unique_ptr<kernels::Stream> stream = rank.ops().make_stream();
      rank.windows().prepare(rank.ops(), *stream, shape);
      rank.windows().attach(fabric);
      DeviceTensor x(rank.ops(), DType::kF32, kMaxRows, kCols);
      for (const Summands& step : steps) {
        const Tensor rows = x.upload<float>(rank.ops(), *stream, step.of_ranks[static_cast<size_t>(fabric.rank().value)].values);
        ASSERT_TRUE(rank.windows().sum(rows).ok());
        std::vector<float> found(step.sum.values.size());
        rank.ops().read_back(*stream, rows.address, std::as_writable_bytes(std::span(found)));
        ASSERT_EQ(found, step.sum.values) << size << " ranks, " << rows.rows << " rows";
      }
    });
  }
}

// Sharing alone, many times, with ranks that are late now and then: no place is written too early.
TEST(TensorWindows, RowsOfEachRankReachAll) {
  constexpr int32_t kSize = 3;
  constexpr int64_t kRows = 10;
  std::vector<std::unique_ptr<TestTensorRank>> ranks = make_ranks("ref", kSize);
  const model::TensorShape shape{kRows, 4, 1, 0};
  group::ThreadGroup group(kSize, 64 + ranks[0]->windows().extra_bytes(shape));
  group.run([&](group::Fabric& fabric) {
    const int32_t r = fabric.rank().value;
    TestTensorRank& rank = *ranks[static_cast<size_t>(r)];
    const std::unique_ptr<kernels::Stream> stream = rank.ops().make_stream();
    rank.windows().prepare(rank.ops(), *stream, shape);
    rank.windows().attach(fabric);
    std::mt19937 random(static_cast<uint32_t>(r));
    DeviceTensor x(rank.ops(), DType::kF32, kRows, 4);
    for (int round = 0; round < 300; ++round) {
      std::vector<float> values(kRows * 4, -1);
      const model::RowRange own = rank.windows().own_rows(kRows);
      for (int64_t row = own.first; row < own.first + own.count; ++row) {
        std::fill_n(values.begin() + row * 4, 4, static_cast<float>(1000 * round + row));
      }
      const Tensor rows = x.upload<float>(rank.ops(), *stream, values);
      if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
      ASSERT_TRUE(rank.windows().share(rows).ok());
      rank.ops().read_back(*stream, rows.address, std::as_writable_bytes(std::span(values)));
      for (int64_t row = 0; row < kRows; ++row) {
        ASSERT_EQ(values[static_cast<size_t>(row * 4)], static_cast<float>(1000 * round + row)) << "round " << round;
      }
    }
  });
}

TEST(TensorWindows, ALostRankIsNamed) {
  std::vector<std::unique_ptr<TestTensorRank>> ranks = make_ranks("ref", 2);
  const model::TensorShape shape{4, 4, 1, 0};
  group::FabricLimits limits;
  limits.rank_timeout_us = 200'000;
  group::ThreadGroup group(2, 64 + ranks[0]->windows().extra_bytes(shape), limits);
  group.run([&](group::Fabric& fabric) {
    if (fabric.rank() == RankId(1)) return;
    TestTensorRank& rank = *ranks[0];
    const std::unique_ptr<kernels::Stream> stream = rank.ops().make_stream();
    rank.windows().prepare(rank.ops(), *stream, shape);
    rank.windows().attach(fabric);
    const DeviceTensor x(rank.ops(), DType::kF32, 4, 4);
    EXPECT_THAT(rank.windows().sum(x.all()).error().message, HasSubstr("rank 1"));
  });
}

// ---- Models ------------------------------------------------------------------------------------------------------

struct ModelCase {
  std::string golden;
  int32_t size = 2;
  model::ComputeType compute = model::ComputeType::kBf16;
  model::QuantizationRequest quantization{};
};

model::LoadOptions load_options(const ModelCase& test) {
  model::LoadOptions options;
  options.path = model::golden_path(test.golden);
  options.compute = test.compute;
  options.quantization = test.quantization;
  options.max_num_batched_tokens = 64;
  options.max_num_seqs = 64;
  options.block_size = 4;
  return options;
}

constexpr int32_t kTokens = 23;
constexpr int32_t kPrompt = 17;

// The steps that compute one sequence: its prompt in chunks, then token by token.
std::vector<model::Batch> make_steps(int64_t vocab, int32_t chunk) {
  std::vector<model::Batch> steps;
  for (int32_t at = 0; at < kTokens;) {
    const int32_t rows = at < kPrompt ? std::min(chunk, kPrompt - at) : 1;
    model::Batch batch;
    model::Chunk part{0, rows, at, at < kPrompt, {}};
    for (int32_t block = 0; block * 4 < at + rows; ++block) part.blocks.push_back(BlockId(block));
    for (int32_t i = 0; i < rows; ++i) {
      batch.tokens.push_back(static_cast<TokenId>((at + i) * 37 % vocab));
      batch.logit_rows.push_back(i);
    }
    batch.chunks.push_back(std::move(part));
    steps.push_back(std::move(batch));
    at += rows;
  }
  return steps;
}

using Logits = std::vector<std::vector<float>>;

Logits run_steps(model::Model& model, kernels::Ops& ops, int32_t chunk, bool has_logits) {
  model::KvCache cache(ops, model.info().kv, (kTokens + 3) / 4);
  Logits logits;
  for (const model::Batch& batch : make_steps(model.info().vocab_size, chunk)) {
    CHECK(model.forward(batch, cache, {}).ok());
    for (size_t i = 0; has_logits && i < batch.logit_rows.size(); ++i) {
      logits.emplace_back(model.logits(i).begin(), model.logits(i).end());
    }
  }
  return logits;
}

Logits run_alone(const ModelCase& test, std::string* fingerprint) {
  const std::unique_ptr<kernels::Ops> ops = kernels::make_ops("auto", 1).value();
  const std::unique_ptr<model::Model> model = model::load_model(*ops, load_options(test)).value();
  *fingerprint = model->info().fingerprint;
  return run_steps(*model, *ops, kPrompt, true);
}

// The logits that the first rank has got, once for each chunk size.
std::vector<Logits> run_shared(const ModelCase& test, std::initializer_list<int32_t> chunks, const std::string& fingerprint) {
  std::vector<std::unique_ptr<TestTensorRank>> ranks = make_ranks("auto", test.size);
  std::vector<std::unique_ptr<model::Model>> models;
  for (const std::unique_ptr<TestTensorRank>& rank : ranks) {
    model::LoadOptions options = load_options(test);
    options.tensor = &rank->windows();
    models.push_back(model::load_model(rank->ops(), options).value());
    EXPECT_EQ(models.back()->info().fingerprint, fingerprint);
  }
  group::ThreadGroup group(test.size, 64 + ranks[0]->windows().window_bytes());
  std::vector<Logits> logits;
  group.run([&](group::Fabric& fabric) {
    const size_t r = static_cast<size_t>(fabric.rank().value);
    ranks[r]->windows().attach(fabric);
    for (const int32_t chunk : chunks) {
      Logits found = run_steps(*models[r], ranks[r]->ops(), chunk, r == 0);
      if (r == 0) logits.push_back(std::move(found));
    }
  });
  return logits;
}

double largest(const Logits& logits) {
  double most = 0;
  for (const std::vector<float>& row : logits) {
    for (const float value : row) most = std::max(most, std::abs(static_cast<double>(value)));
  }
  return most;
}

double largest_difference(const Logits& one, const Logits& other) {
  CHECK_EQ(one.size(), other.size());
  double most = 0;
  for (size_t row = 0; row < one.size(); ++row) {
    for (size_t i = 0; i < one[row].size(); ++i) {
      const double difference = std::abs(static_cast<double>(one[row][i]) - static_cast<double>(other[row][i]));
      most = std::isnan(difference) ? INFINITY : std::max(most, difference);
    }
  }
  return most;
}

TEST(TensorModel, AModelThatIsSharedAnswersAlmostAsOneRankAndExactlyAsItself) {
  std::vector<ModelCase> cases{{"ds_base", 4}};
  for (const char* golden : {"ds_base", "ds_no_q_lora", "ds_fp8", "qwen_base", "qwen_tied", "qwen_dense_layers"}) {
    cases.push_back({golden});
    cases.push_back({golden, 2, model::ComputeType::kF32});
  }
  for (const ModelCase& test : cases) {
    const double tolerance = test.compute == model::ComputeType::kF32 ? kF32Tolerance : kBf16Tolerance;
    std::string fingerprint;
    const Logits alone = run_alone(test, &fingerprint);
    const std::vector<Logits> shared = run_shared(test, {kPrompt, 5, 1, kPrompt}, fingerprint);
    EXPECT_LE(largest_difference(shared[0], alone), tolerance * largest(alone)) << test.golden << ' ' << test.size;
    for (const Logits& other : shared) EXPECT_EQ(other, shared[0]) << test.golden << ' ' << test.size;
  }
}

// Both ranks in one cache, in which the first one is told of a layer only when the other one's heads are there too, however
// late that is; with chunks, and with steps in two parts.
TEST(TensorModel, ALayerIsToldOfWhenAllRanksHaveWrittenIt) {
  constexpr uint32_t kSeed = 17;
  SCOPED_TRACE(kSeed);
  const ModelCase test{"qwen_base"};
  std::vector<std::unique_ptr<TestTensorRank>> ranks = make_ranks("auto", test.size);
  std::vector<std::unique_ptr<model::Model>> models;
  for (const std::unique_ptr<TestTensorRank>& rank : ranks) {
    model::LoadOptions options = load_options(test);
    options.tensor = &rank->windows();
    models.push_back(model::load_model(rank->ops(), options).value());
  }
  constexpr int64_t kBlocks = (kTokens + 3) / 4;
  const model::KvLayout layout = models[0]->info().kv;
  for (const bool is_split : {false, true}) {
    for (const int32_t chunk : {kPrompt, 5}) {
      const model::KvCache whole(ranks[0]->ops(), layout.with_heads(layout.kv_heads * test.size), kBlocks);
      std::vector<std::unique_ptr<model::KvCache>> own;  // as if nothing was shared
      for (const auto& rank : ranks) own.push_back(std::make_unique<model::KvCache>(rank->ops(), layout, kBlocks));
      group::ThreadGroup group(test.size, 64 + ranks[0]->windows().window_bytes());
      group.run([&](group::Fabric& fabric) {
        const size_t r = static_cast<size_t>(fabric.rank().value);
        ranks[r]->windows().attach(fabric);
        std::mt19937 random(kSeed);
        model::KvCache part = model::KvCache::part_of(whole, {fabric.rank().value, test.size});
        const auto copy_layer = [&](int64_t layer) {
          const std::byte* const begin = whole.block_address(layer, BlockId(0));
          return std::vector<std::byte>(begin, begin + whole.layer_stride_bytes());
        };
        for (model::Batch& batch : make_steps(models[r]->info().vocab_size, chunk)) {
          const int32_t rows = static_cast<int32_t>(batch.tokens.size());
          if (is_split && rows > 1) batch.split_row = rows / 2;
          std::vector<std::vector<std::byte>> told;
          if (r != 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 5000));
          ASSERT_TRUE(models[r]->forward(batch, part, [&](int layer) {
                        ASSERT_EQ(layer, std::ssize(told));
                        told.push_back(copy_layer(layer));
                      }).ok());
          for (int64_t layer = 0; r == 0 && layer < layout.num_layers; ++layer) {
            ASSERT_EQ(copy_layer(layer), told.at(static_cast<size_t>(layer))) << "layer " << layer;
          }
          ASSERT_TRUE(models[r]->forward(batch, *own[r], {}).ok());
        }
        for (int64_t layer = 0; layer < layout.num_layers; ++layer) {
          for (int32_t block = 0; block < kBlocks; ++block) {
            ASSERT_EQ(std::memcmp(part.block_address(layer, BlockId(block)), own[r]->block_address(layer, BlockId(block)),
                                  static_cast<size_t>(layout.block_bytes())), 0);
          }
        }
      });
    }
  }
}

// Rounding of rows to integers makes more of the order of sums: what is compared is that it is still the same model.
TEST(TensorModel, QuantisedModelsCanBeShared) {
  for (const model::QuantizationRequest& request :
       {model::QuantizationRequest{"wint8", 0}, model::QuantizationRequest{"wint4", -1}}) {
    const ModelCase test{"ds_base", 2, model::ComputeType::kBf16, request};
    std::string fingerprint;
    const Logits alone = run_alone(test, &fingerprint);
    const std::vector<Logits> shared = run_shared(test, {kPrompt, 4}, fingerprint);
    EXPECT_LE(largest_difference(shared[0], alone), kBf16Tolerance * largest(alone)) << request.name;
    EXPECT_EQ(shared[1], shared[0]);
  }
}

TEST(TensorModel, GroupsThatCannotBeSharedAreRefused) {
  TestTensorRank rank("ref", 0, 2);
  model::LoadOptions options = load_options({"ds_base", 2, model::ComputeType::kBf16, {"wint4", 32}});
  options.tensor = &rank.windows();
  EXPECT_THAT(model::load_model(rank.ops(), options).error().message, HasSubstr("in groups of 32"));
}

TEST(TensorModel, HeadsThatCannotBeSharedAreRefused) {
  TestTensorRank rank("ref", 0, 3);
  model::LoadOptions options = load_options({"ds_base", 3});
  options.tensor = &rank.windows();
  EXPECT_THAT(model::load_model(rank.ops(), options).error().message, HasSubstr("--tensor-parallel-size 3: num_attention_heads"));
}

}  // namespace
}  // namespace tandem::tp
