// A row's logits are the same bits however the steps around it are cut, on every backend of this machine.
#include "src/model/test_support.h"

namespace tandem::model {
namespace {

struct ExactCase {
  std::string backend;
  std::string golden;
  ComputeType compute;
  QuantizationRequest quantization;
  KvCacheType kv_cache = KvCacheType::kAuto;
  const char* routing = "";
};

std::vector<ExactCase> exact_cases() {
  std::vector<ExactCase> cases;
  for (const std::string& backend : kernels::available_backends()) {
    for (const char* golden : {"ds_base", "ds_fp8", "qwen_base"}) {
      for (const ComputeType compute : {ComputeType::kF32, ComputeType::kBf16}) {
        cases.push_back({backend, golden, compute, {}});
      }
      cases.push_back({backend, golden, ComputeType::kBf16, {}, KvCacheType::kF8E4M3});
    }
    const std::pair<const char*, QuantizationRequest> quantised[] = {
        {"ds_base", {"wint8", 0}}, {"qwen_base", {"wint4", 0}}, {"ds_base", {"wint4", 32}},
        {"ds_base", {"w8a8", 0}},  {"qwen_base", {"w8a8", 0}},  {"qwen_base", {"w4a8", 32}}};
    for (const auto& [golden, request] : quantised) {
      const bool is_slow = backend == "ref" && std::string_view(golden) == "ds_base";
      if (!is_slow) cases.push_back({backend, golden, ComputeType::kBf16, request});
    }
  }
  for (const char* routing : {"uniform_random", "zipf:0.6", "balanced"}) {
    cases.push_back({"auto", "ds_base", ComputeType::kBf16, {}, KvCacheType::kAuto, routing});
    cases.push_back({"auto", "qwen_base", ComputeType::kBf16, {}, KvCacheType::kAuto, routing});
  }
  return cases;
}

std::string case_name(const testing::TestParamInfo<ExactCase>& test) {
  std::string name = test.param.backend + "_" + test.param.golden;
  name += test.param.routing;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return std::isalnum(static_cast<unsigned char>(c)) == 0; }, '_');
  const QuantizationRequest& request = test.param.quantization;
  if (request.name != "auto") return fmt::format("{}_{}_g{}", name, request.name, request.group_size);
  name += test.param.compute == ComputeType::kF32 ? "_f32" : "_bf16";
  return name + (test.param.kv_cache == KvCacheType::kF8E4M3 ? "_kv_fp8" : "");
}

// Sequence i: `prompt[i]` prompt tokens, then generated ones.
struct Workload {
  std::vector<std::vector<TokenId>> tokens;
  std::vector<int32_t> prompt;
};

Workload make_workload(int64_t vocab_size) {
  std::mt19937_64 random(20240607);
  Workload work;
  for (const auto& [prompt, generated] :
       std::vector<std::pair<int32_t, int32_t>>{{1, 9}, {7, 3}, {8, 8}, {9, 0}, {70, 12}, {16, 1}, {33, 5}, {5, 30}}) {
    std::vector<TokenId> tokens;
    for (int32_t i = 0; i < prompt + generated; ++i) {
      tokens.push_back(static_cast<TokenId>(random() % static_cast<uint64_t>(vocab_size)));
    }
    work.tokens.push_back(std::move(tokens));
    work.prompt.push_back(prompt);
  }
  return work;
}

class ExactnessTest : public testing::TestWithParam<ExactCase> {
 protected:
  ExactnessTest() {
    work_ = make_workload(model_->info().vocab_size);
    // The yardstick: each sequence alone, whole prompt, then token by token.
    Sequences alone(*ops_, *model_, work_.tokens);
    for (size_t i = 0; i < work_.tokens.size(); ++i) {
      alone.run(i, work_.prompt[i], work_.prompt[i]);
      expected_.push_back(alone.logits(i));
    }
  }

  LoadOptions options() const {
    LoadOptions options = golden_options(golden_path(GetParam().golden), GetParam().compute);
    options.quantization = GetParam().quantization;
    options.kv_cache = GetParam().kv_cache;
    options.simulation = parse_routing_simulation(GetParam().routing, 5).value();
    options.keep_routing = options.simulation.is_on();
    return options;
  }

  // All sequences in steps of chunks of up to `most_rows` rows, in any order, until all are computed.
  void run_mixed(Sequences& sequences, uint64_t seed, int32_t most_rows) {
    std::mt19937_64 random(seed);
    bool is_done = false;
    while (!is_done) {
      std::vector<Piece> pieces;
      is_done = true;
      for (size_t i = 0; i < work_.tokens.size(); ++i) {
        const int32_t done = static_cast<int32_t>(sequences.logits(i).size());
        const int32_t total = static_cast<int32_t>(work_.tokens[i].size());
        const bool is_prompt = done < work_.prompt[i];
        const int32_t left = (is_prompt ? work_.prompt[i] : total) - done;
        is_done &= left == 0;
        if (left == 0 || random() % 4 == 0) continue;
        pieces.push_back(
            {i, 1 + static_cast<int32_t>(random() % static_cast<uint64_t>(std::min(left, most_rows))), is_prompt});
      }
      std::shuffle(pieces.begin(), pieces.end(), random);
      if (!pieces.empty()) sequences.step(pieces);
    }
    for (size_t i = 0; i < work_.tokens.size(); ++i) {
      ASSERT_EQ(sequences.logits(i), expected_[i]) << "sequence " << i << ", seed " << seed;
    }
  }

  const std::unique_ptr<kernels::Ops> ops_ = must_make_ops(GetParam().backend, 1);
  const std::unique_ptr<Model> model_ = must_load(*ops_, options());
  Workload work_;
  std::vector<Sequences::Logits> expected_;
};

TEST_P(ExactnessTest, ChunkSizesDoNotShow) {
  for (const int32_t chunk : {1, 7, 64}) {
    Sequences sequences(*ops_, *model_, work_.tokens);
    for (size_t i = 0; i < work_.tokens.size(); ++i) {
      sequences.run(i, work_.prompt[i], chunk);
      ASSERT_EQ(sequences.logits(i), expected_[i]) << "sequence " << i << " in chunks of " << chunk;
    }
  }
}

// As after a preemption: generated tokens are computed again, several in one chunk.
TEST_P(ExactnessTest, GeneratedTokensRecomputedTogether) {
  for (const int32_t chunk : {2, 64}) {
    Sequences sequences(*ops_, *model_, work_.tokens);
    for (size_t i = 0; i < work_.tokens.size(); ++i) {
      sequences.run(i, work_.prompt[i], 64, chunk);
      ASSERT_EQ(sequences.logits(i), expected_[i]) << "sequence " << i << " in chunks of " << chunk;
    }
  }
}

TEST_P(ExactnessTest, BatchesOfMixedChunksInAnyOrder) {
  constexpr uint64_t kSeed = 99;
  Sequences sequences(*ops_, *model_, work_.tokens, kSeed);
  run_mixed(sequences, kSeed, 9);
}

// Cut between sequences and within them.
TEST_P(ExactnessTest, StepsInTwoParts) {
  constexpr uint64_t kSeed = 17;
  Sequences sequences(*ops_, *model_, work_.tokens, kSeed);
  sequences.split_steps(kSeed);
  run_mixed(sequences, kSeed, 30);
}

TEST_P(ExactnessTest, ThreadsDoNotShow) {
  const std::unique_ptr<kernels::Ops> ops = must_make_ops(GetParam().backend, 2);
  const std::unique_ptr<Model> model = must_load(*ops, options());
  EXPECT_EQ(model->info().fingerprint, model_->info().fingerprint);
  Sequences sequences(*ops, *model, work_.tokens);
  for (size_t i = 0; i < work_.tokens.size(); ++i) {
    sequences.run(i, work_.prompt[i], 64, 3);
    ASSERT_EQ(sequences.logits(i), expected_[i]) << "sequence " << i;
  }
}

// Only some rows wanted, and the cache of a layer complete when on_layer_done says so.
TEST_P(ExactnessTest, LayerDoneAndWantedRows) {
  const size_t longest = 4;
  Sequences sequences(*ops_, *model_, work_.tokens);
  KvCache& cache = sequences.cache();
  const auto read_layer = [&](int64_t layer) {
    std::vector<std::byte> bytes(static_cast<size_t>(cache.layer_stride_bytes()));
    const std::unique_ptr<kernels::Stream> stream = ops_->make_stream();
    ops_->read_back(*stream, cache.block_address(layer, BlockId(0)), bytes);
    return bytes;
  };
  Batch batch;
  batch.tokens.assign(work_.tokens[longest].begin(), work_.tokens[longest].begin() + work_.prompt[longest]);
  batch.chunks.push_back({0, work_.prompt[longest], 0, true, sequences.blocks(longest)});
  batch.logit_rows = {2, 40, work_.prompt[longest] - 1};
  std::vector<int> layers;
  std::vector<std::vector<std::byte>> seen;
  std::vector<int> all(static_cast<size_t>(model_->info().kv.num_layers));
  std::iota(all.begin(), all.end(), 0);
  for (const int32_t split : {0, 33}) {
    layers.clear();
    seen.clear();
    batch.split_row = split;
    for (const BlockId block : sequences.blocks(longest)) cache.fill(block, 0.0F);
    const Status done = model_->forward(batch, cache, [&](int layer) {
      layers.push_back(layer);
      seen.push_back(read_layer(layer));
    });
    ASSERT_TRUE(done.ok());
    EXPECT_EQ(layers, all);
    for (const int layer : all) EXPECT_TRUE(seen[static_cast<size_t>(layer)] == read_layer(layer));
  }
  for (size_t i = 0; i < batch.logit_rows.size(); ++i) {
    const std::span<const float> logits = model_->logits(i);
    EXPECT_EQ(std::vector<float>(logits.begin(), logits.end()),
              expected_[longest][static_cast<size_t>(batch.logit_rows[i])]);
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, ExactnessTest, testing::ValuesIn(exact_cases()), case_name);

// The test above can fail: roles do show in the bits of an MLA model.
TEST(Exactness, RolesOfMlaRowsDiffer) {
  const std::unique_ptr<kernels::Ops> ops = must_make_ops("ref");
  const std::unique_ptr<Model> model = must_load(*ops, golden_options(golden_path("ds_base"), ComputeType::kF32));
  const Workload work = make_workload(model->info().vocab_size);
  Sequences expanded(*ops, *model, work.tokens);
  Sequences absorbed(*ops, *model, work.tokens);
  expanded.run(4, 82, 82);
  absorbed.run(4, 70, 70);
  EXPECT_NE(expanded.logits(4), absorbed.logits(4));
}

TEST(StepDeathTest, RefusesBatchesThatBreakTheContract) {
  const std::unique_ptr<kernels::Ops> ops = must_make_ops("ref");
  const std::unique_ptr<Model> model = must_load(*ops, golden_options(golden_path("qwen_base"), ComputeType::kF32));
  KvCache cache(*ops, model->info().kv, 4);
  const auto run = [&](const std::function<void(Batch&)>& change) {
    Batch batch;
    batch.tokens = {1, 2, 3};
    batch.chunks.push_back({0, 3, 0, true, {BlockId(2)}});
    batch.logit_rows = {2};
    change(batch);
    ASSERT_TRUE(model->forward(batch, cache, {}).ok());
  };
  run([](Batch&) {});
  EXPECT_EQ(model->logits(0).size(), static_cast<size_t>(model->info().vocab_size));
  EXPECT_DEATH((void)model->logits(1), "index < num_logits_ \\(1 vs 1\\)");
  EXPECT_DEATH(run([](Batch& b) { b.tokens[1] = -1; }), "token >= 0");
  EXPECT_DEATH(run([](Batch& b) { b.tokens[1] = 1 << 20; }), "vocab_size");
  EXPECT_DEATH(run([](Batch& b) { b.tokens.push_back(0); }), "positions_.size\\(\\)");
  EXPECT_DEATH(run([](Batch& b) { b.tokens.resize(257); }), "max_rows \\(257 vs 256\\)");
  EXPECT_DEATH(run([](Batch& b) { b.chunks[0].blocks.clear(); }), "needed \\(0 vs 1\\)");
  EXPECT_DEATH(run([](Batch& b) { b.chunks[0].blocks[0] = BlockId(4); }), "num_blocks\\(\\) \\(4 vs 4\\)");
  EXPECT_DEATH(run([](Batch& b) { b.chunks[0].first_position = 511; }), "max_positions \\(514 vs 512\\)");
  EXPECT_DEATH(run([](Batch& b) { b.logit_rows = {3}; }), "logit_rows.back");
}

}  // namespace
}  // namespace tandem::model
