// The same request gives the same tokens and logprobs, bit for bit, whatever runs beside it and wherever it runs.
// Real models, the real engine, the real transfer agent; every comparison is ==.
#include <gtest/gtest.h>

#include <condition_variable>
#include <filesystem>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <tuple>

#include "src/engine/engine.h"
#include "src/transfer/agent.h"

namespace tandem::engine {
namespace {

constexpr int64_t kMaxModelLen = 512;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kNumPrompts = 12;  // kernels are some fifty times slower here, and it is memory that is looked at
#else
constexpr size_t kNumPrompts = 100;
#endif
constexpr size_t kNumQuantisedPrompts = kNumPrompts / 4;
constexpr int64_t kMaxTokens = 12;

struct Answer {
  std::vector<TokenId> tokens;
  std::vector<float> logprobs;
  std::vector<std::pair<TokenId, float>> top_logprobs;
  std::string error;
  bool operator==(const Answer&) const = default;
};

struct ModelSetup {
  const char* path;
  model::KvCacheType kv_cache = model::KvCacheType::kAuto;
};

struct RankSetup {
  std::string backend = "auto";
  model::QuantizationRequest quantization;
  int threads = 1;
  int64_t max_num_batched_tokens = 512;
  int64_t max_num_seqs = 1;
  int64_t max_step_us = 0;
  int64_t num_blocks = 2 * kMaxModelLen / 16 * 16;
  bool prefix_caching = false;
  std::optional<KvRole> kv_role;
  bool first_token_from_decode = false;
  int64_t block_size = 16;
};

// A model, its cache, an engine and, for a kv_role, an agent: what one worker process has.
class Rank {
 public:
  Rank(const ModelSetup& model, const RankSetup& setup) {
    ops_ = kernels::make_ops(setup.backend, setup.threads).value();
    model::LoadOptions load;
    load.path = std::string(TANDEM_SOURCE_DIR) + "/" + model.path;
    load.kv_cache = model.kv_cache;
    load.quantization = setup.quantization;
    load.max_num_batched_tokens = setup.max_num_batched_tokens;
    load.max_num_seqs = setup.max_num_seqs;
    load.max_model_len = kMaxModelLen;
    load.block_size = setup.block_size;
    model_ = model::load_model(*ops_, load).value();
    const model::ModelInfo& info = model_->info();
    cache_ = std::make_unique<model::KvCache>(*ops_, info.kv, setup.num_blocks);
    EngineOptions options;
    options.model_name = "exact";
    options.limits.max_num_batched_tokens = setup.max_num_batched_tokens;
    options.limits.max_num_seqs = setup.max_num_seqs;
    options.limits.max_step_us = setup.max_step_us;
    options.limits.max_num_waiting = 4096;
    options.limits.block_size = info.kv.block_size;
    options.limits.prefix_caching = setup.prefix_caching;
    options.limits.rows_depend_on_role = info.rows_depend_on_role;
    options.sampled_vocab = info.vocab_size;
    options.kv_role = setup.kv_role.value_or(KvRole::kBoth);
    options.kv_host = "127.0.0.1";
    options.first_token_from_decode = setup.first_token_from_decode;
    engine_ = std::make_unique<Engine>(*model_, *cache_, options, clock_, registry_);
    if (setup.kv_role) {
      transfer::AgentOptions agent;
      agent.engine_id = kv_role_name(*setup.kv_role);
      agent.model_fingerprint = info.fingerprint;
      agent.role = *setup.kv_role;
      agent_ = transfer::make_agent(*cache_, agent, [engine = engine_.get()] { engine->wake(); }).value();
      engine_->attach(agent_.get());
    }
    engine_->start();
  }
  ~Rank() {
    engine_->stop();
    agent_.reset();
  }
  Engine& engine() { return *engine_; }
  int64_t vocab_size() const { return model_->info().vocab_size; }
  double metric(const std::string& name) {
    const std::string text = registry_.expose();
    const size_t at = text.find("\n" + name + "{");
    return at == std::string::npos ? -1 : std::stod(text.substr(text.find("} ", at) + 2));
  }

 private:
  SteadyClock clock_;
  Registry registry_;
  std::unique_ptr<kernels::Ops> ops_;
  std::unique_ptr<model::Model> model_;
  std::unique_ptr<model::KvCache> cache_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<transfer::Agent> agent_;
};

// Collects the events of one request; `on_reservation` gets a push reservation, `on_publication` a pull publication.
class Collector {
 public:
  EventSink sink() {
    return [this](TokenEvent&& event) {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const GeneratedToken& token : event.tokens) {
        answer_.tokens.push_back(token.token);
        answer_.logprobs.push_back(token.logprob);
        answer_.top_logprobs.insert(answer_.top_logprobs.end(), token.top_logprobs.begin(), token.top_logprobs.end());
      }
      if (event.kv_transfer) kv_transfer_ = event.kv_transfer;
      if (event.error) answer_.error = event.error->message;
      done_ = done_ || event.finish || event.error;
      changed_.notify_all();
    };
  }
  Answer wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(120), [this] { return done_; }));
    return answer_;
  }
  std::optional<transfer::KvTransferParams> wait_for_kv_transfer() {
    std::unique_lock<std::mutex> lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(120), [this] { return done_ || kv_transfer_; }));
    return kv_transfer_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  Answer answer_;
  std::optional<transfer::KvTransferParams> kv_transfer_;
  bool done_ = false;
};

// Mixed lengths around block borders; every fifth shares a prefix with the others; half greedy, half seeded.
std::vector<TokenRequest> make_requests(int64_t vocab_size, size_t count) {
  std::mt19937 random(7);
  const auto token = [&] { return static_cast<TokenId>(random() % static_cast<uint64_t>(vocab_size)); };
  std::vector<TokenId> shared(200);
  for (TokenId& id : shared) id = token();
  constexpr size_t kBorders[] = {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65};
  std::vector<TokenRequest> requests(count);
  for (size_t i = 0; i < count; ++i) {
    TokenRequest& request = requests[i];
    const size_t length = i % 2 == 0 ? kBorders[random() % std::size(kBorders)] : 1 + random() % 150;
    if (i % 5 == 0) request.prompt.assign(shared.begin(), shared.begin() + static_cast<std::ptrdiff_t>(length));
    while (request.prompt.size() < length + i % 3) request.prompt.push_back(token());
    request.sampling.max_tokens = kMaxTokens;
    request.sampling.ignore_eos = true;
    request.sampling.num_logprobs = 2;
    request.sampling.temperature = 0;
    if (i % 2 == 1) {
      request.sampling.temperature = 0.8;
      request.sampling.top_p = 0.95;
      request.sampling.top_k = 50;
      request.sampling.seed = 100 + i;
      request.sampling.repetition_penalty = 1.2;
    }
  }
  return requests;
}

// At most `parallel` requests at a time.
std::vector<Answer> run_all(Rank& rank, const std::vector<TokenRequest>& requests, size_t parallel) {
  std::vector<Answer> answers(requests.size());
  std::vector<std::unique_ptr<Collector>> open(requests.size());
  for (size_t i = 0; i < requests.size() + parallel; ++i) {
    if (i >= parallel) answers[i - parallel] = open[i - parallel]->wait();
    if (i < requests.size()) {
      open[i] = std::make_unique<Collector>();
      rank.engine().submit(requests[i], open[i]->sink());
    }
  }
  return answers;
}

std::string name_of(const ModelSetup& model) {
  std::string name = model.path;
  for (char& letter : name) {
    if (std::isalnum(static_cast<unsigned char>(letter)) == 0) letter = '_';
  }
  return name + (model.kv_cache == model::KvCacheType::kF8E4M3 ? "_kv_fp8" : "");
}

// One after the other through both ranks. `firsts` gets prefill's answers.
std::vector<Answer> push_all(Rank& prefill, Rank& decode, const std::vector<TokenRequest>& requests,
                             std::vector<Answer>& firsts) {
  std::vector<Answer> answers;
  for (const TokenRequest& request : requests) {
    TokenRequest to_decode = request;
    to_decode.kv_transfer.emplace();
    to_decode.kv_transfer->do_remote_prefill = true;
    to_decode.kv_transfer->mode = transfer::TransferMode::kPush;
    Collector decoded;
    decode.engine().submit(to_decode, decoded.sink());
    TokenRequest to_prefill = request;
    to_prefill.kv_transfer = decoded.wait_for_kv_transfer();
    Collector prefilled;
    if (to_prefill.kv_transfer) {
      prefill.engine().submit(to_prefill, prefilled.sink());
      firsts.push_back(prefilled.wait());
      EXPECT_EQ(firsts.back().error, "");
    }
    answers.push_back(decoded.wait());
  }
  return answers;
}

std::vector<Answer> pull_all(Rank& prefill, Rank& decode, const std::vector<TokenRequest>& requests) {
  std::vector<Answer> answers;
  for (const TokenRequest& request : requests) {
    TokenRequest to_prefill = request;
    to_prefill.kv_transfer.emplace().do_remote_decode = true;
    Collector prefilled;
    prefill.engine().submit(to_prefill, prefilled.sink());
    EXPECT_EQ(prefilled.wait().error, "");
    TokenRequest to_decode = request;
    to_decode.prompt = {1};
    to_decode.kv_transfer = prefilled.wait_for_kv_transfer();
    Collector decoded;
    decode.engine().submit(to_decode, decoded.sink());
    answers.push_back(decoded.wait());
  }
  return answers;
}

class Exactness : public testing::TestWithParam<ModelSetup> {
 protected:
  void SetUp() override {
    // Computed once per model: each prompt alone, whole, cold, on one thread.
    static std::map<std::string, std::pair<std::vector<TokenRequest>, std::vector<Answer>>> known;
    const std::string name = name_of(GetParam());
    if (!known.contains(name)) {
      Rank alone(GetParam(), {});
      requests_ = make_requests(alone.vocab_size(), kNumPrompts);
      known[name] = {requests_, run_all(alone, requests_, 1)};
    }
    std::tie(requests_, expected_) = known[name];
    for (const Answer& answer : expected_) {
      ASSERT_EQ(answer.error, "");
      ASSERT_EQ(answer.tokens.size(), static_cast<size_t>(kMaxTokens));
    }
  }
  void expect_same(const std::vector<Answer>& answers, const std::string& what) {
    ASSERT_EQ(answers.size(), expected_.size());
    size_t different = 0;
    for (size_t i = 0; i < answers.size(); ++i) {
      if (answers[i] == expected_[i]) continue;
      if (++different <= 3) {
        ADD_FAILURE() << what << ": request " << i << " of " << requests_[i].prompt.size() << " tokens differs"
                      << (answers[i].tokens == expected_[i].tokens ? " in logprobs " : " in tokens ")
                      << answers[i].error;
      }
    }
    EXPECT_EQ(different, 0U) << what;
  }

  std::vector<TokenRequest> requests_;
  std::vector<Answer> expected_;
};

TEST_P(Exactness, BatchOf16) {
  RankSetup setup;
  setup.max_num_seqs = 16;
  Rank rank(GetParam(), setup);
  expect_same(run_all(rank, requests_, 16), "batch of 16");
}

TEST_P(Exactness, ChunkSizes) {
  for (const int64_t chunk : {1, 7, 64}) {
    RankSetup setup;
    setup.max_num_batched_tokens = chunk;
    Rank rank(GetParam(), setup);
    expect_same(run_all(rank, requests_, 1), "chunks of " + std::to_string(chunk));
  }
  RankSetup mixed;
  mixed.max_num_batched_tokens = 23;
  mixed.max_num_seqs = 8;
  Rank rank(GetParam(), mixed);
  expect_same(run_all(rank, requests_, 8), "8 at once in steps of 23 rows");
}

// Steps whose rows follow the clock, hence chunks that differ from run to run.
TEST_P(Exactness, StepsLimitedByTime) {
  for (const int64_t max_step_us : {1, 2000}) {
    RankSetup setup;
    setup.max_num_seqs = 8;
    setup.max_step_us = max_step_us;
    Rank rank(GetParam(), setup);
    expect_same(run_all(rank, requests_, 8), "steps of " + std::to_string(max_step_us) + " us");
  }
}

TEST_P(Exactness, PrefixHits) {
  RankSetup setup;
  setup.prefix_caching = true;
  setup.max_num_seqs = 4;
  Rank rank(GetParam(), setup);
  expect_same(run_all(rank, requests_, 4), "cold with a shared prefix");
  const double hits = rank.metric("vllm:prefix_cache_hits_total");
  expect_same(run_all(rank, requests_, 4), "full hits");
  EXPECT_GT(rank.metric("vllm:prefix_cache_hits_total"), hits);
}

TEST_P(Exactness, ForcedPreemption) {
  // Answers that outgrow the pool: the running requests hold far fewer blocks when they begin than when they end.
  for (TokenRequest& request : requests_) request.sampling.max_tokens = 40;
  {
    Rank alone(GetParam(), {});
    expected_ = run_all(alone, requests_, 1);
  }
  for (const bool prefix_caching : {false, true}) {
    RankSetup setup;
    setup.num_blocks = kMaxModelLen / 16;
    setup.max_num_seqs = 16;
    setup.prefix_caching = prefix_caching;
    Rank rank(GetParam(), setup);
    expect_same(run_all(rank, requests_, 16), "preemption");
    EXPECT_GT(rank.metric("vllm:num_preemptions_total"), 0);
  }
}

// An answer that goes on at another worker behind what a dead one had sent.
TEST_P(Exactness, ResumedElsewhere) {
  for (const bool prefix_caching : {false, true}) {
    RankSetup setup;
    setup.max_num_seqs = 16;
    setup.prefix_caching = prefix_caching;
    Rank rank(GetParam(), setup);
    std::vector<TokenRequest> rest = requests_;
    std::vector<Answer> parts(rest.size());
    for (size_t i = 0; i < rest.size(); ++i) {
      const Answer& whole = expected_[i];
      const size_t sent = 1 + i % (whole.tokens.size() - 1);
      rest[i].resumed.assign(whole.tokens.begin(), whole.tokens.begin() + static_cast<std::ptrdiff_t>(sent));
      parts[i].tokens = rest[i].resumed;
      parts[i].logprobs.assign(whole.logprobs.begin(), whole.logprobs.begin() + static_cast<std::ptrdiff_t>(sent));
      parts[i].top_logprobs.assign(whole.top_logprobs.begin(),
                                   whole.top_logprobs.begin() + static_cast<std::ptrdiff_t>(2 * sent));
    }
    const std::vector<Answer> tails = run_all(rank, rest, 16);
    for (size_t i = 0; i < rest.size(); ++i) {
      parts[i].error = tails[i].error;
      parts[i].tokens.insert(parts[i].tokens.end(), tails[i].tokens.begin(), tails[i].tokens.end());
      parts[i].logprobs.insert(parts[i].logprobs.end(), tails[i].logprobs.begin(), tails[i].logprobs.end());
      parts[i].top_logprobs.insert(parts[i].top_logprobs.end(), tails[i].top_logprobs.begin(),
                                   tails[i].top_logprobs.end());
    }
    expect_same(parts, "resumed");
  }
}

TEST_P(Exactness, ThreadCounts) {
  for (const int threads : {2, 3}) {
    RankSetup setup;
    setup.threads = threads;
    setup.max_num_seqs = 8;
    Rank rank(GetParam(), setup);
    expect_same(run_all(rank, requests_, 8), std::to_string(threads) + " threads");
  }
}

TEST_P(Exactness, PushedFromPrefillToDecode) {
  struct Case {
    bool prefix_caching;
    bool first_token_from_decode;
  };
  for (const Case& c : {Case{false, false}, Case{true, false}, Case{true, true}}) {
    RankSetup setup;
    setup.max_num_seqs = 8;
    setup.max_num_batched_tokens = 40;
    setup.prefix_caching = c.prefix_caching;
    setup.kv_role = KvRole::kProducer;
    Rank prefill(GetParam(), setup);
    setup.kv_role = KvRole::kConsumer;
    setup.first_token_from_decode = c.first_token_from_decode;
    Rank decode(GetParam(), setup);
    std::vector<Answer> firsts;
    const std::vector<Answer> answers = push_all(prefill, decode, requests_, firsts);
    expect_same(answers, "push");
    ASSERT_EQ(firsts.size(), answers.size());
    for (size_t i = 0; i < firsts.size(); ++i) EXPECT_EQ(firsts[i].tokens.at(0), answers[i].tokens.at(0));
    EXPECT_EQ(decode.metric("tandem:kv_blocks_pinned"), 0);
  }
}

TEST_P(Exactness, PulledByDecodeFromPrefill) {
  RankSetup setup;
  setup.max_num_seqs = 8;
  setup.prefix_caching = true;
  setup.kv_role = KvRole::kBoth;
  Rank prefill(GetParam(), setup);
  Rank decode(GetParam(), setup);
  expect_same(pull_all(prefill, decode, requests_), "pull");
}

// Who has the handle but asks for something else is refused, and the rightful request still gets what was published.
TEST_P(Exactness, ARefusedPullLeavesThePublication) {
  RankSetup setup;
  setup.kv_role = KvRole::kBoth;
  Rank prefill(GetParam(), setup);
  Rank decode(GetParam(), setup);
  Rank stranger(GetParam(), setup);
  TokenRequest to_prefill = requests_[1];
  to_prefill.kv_transfer.emplace().do_remote_decode = true;
  Collector prefilled;
  prefill.engine().submit(to_prefill, prefilled.sink());
  EXPECT_EQ(prefilled.wait().error, "");
  TokenRequest right = requests_[1];
  right.kv_transfer = prefilled.wait_for_kv_transfer();
  ASSERT_TRUE(right.kv_transfer.has_value());

  TokenRequest wrong = right;
  wrong.kv_transfer->prompt_token_ids.clear();
  wrong.kv_transfer->remote_num_tokens = 0;
  TokenRequest other_prompt = wrong;
  other_prompt.prompt.back() ^= 1;
  TokenRequest other_length = wrong;
  other_length.prompt.push_back(1);
  TokenRequest other_engine = right;
  other_engine.kv_transfer->remote_engine_id = "kv_both:1";
  for (const TokenRequest& request : {other_prompt, other_length, other_engine}) {
    for (Rank* rank : {&decode, &stranger}) {
      Collector refused;
      rank->engine().submit(request, refused.sink());
      EXPECT_NE(refused.wait().error, "");
    }
  }
  Collector decoded;
  decode.engine().submit(right, decoded.sink());
  const Answer answer = decoded.wait();
  EXPECT_EQ(answer.error, "");
  EXPECT_TRUE(answer == expected_[1]);
}

// What nobody comes for gives its blocks back long before its lease ends, and only who has the handle can do that.
TEST_P(Exactness, AReleasedPublicationGivesItsBlocksBack) {
  RankSetup setup;
  setup.kv_role = KvRole::kBoth;
  Rank prefill(GetParam(), setup);
  Rank decode(GetParam(), setup);
  const auto publish = [&](const TokenRequest& request) {
    TokenRequest leg = request;
    leg.kv_transfer.emplace().do_remote_decode = true;
    Collector prefilled;
    prefill.engine().submit(leg, prefilled.sink());
    EXPECT_EQ(prefilled.wait().error, "");
    return *prefilled.wait_for_kv_transfer();
  };
  const auto has_pinned_within = [](Rank& rank, bool some, int tries) {
    for (int i = 0; i < tries; ++i) {
      if ((rank.metric("tandem:kv_blocks_pinned") > 0) == some) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
  };
  const transfer::KvTransferParams published = publish(requests_[1]);
  EXPECT_TRUE(has_pinned_within(prefill, true, 400));
  transfer::KvTransferParams other_life = published, other_handle = published;
  other_life.remote_engine_id += "0";
  other_handle.remote_request_id.back() = other_handle.remote_request_id.back() == '0' ? '1' : '0';
  prefill.engine().release(other_life);
  prefill.engine().release(other_handle);
  decode.engine().release(published);
  EXPECT_FALSE(has_pinned_within(prefill, false, 20));
  prefill.engine().release(published);
  EXPECT_TRUE(has_pinned_within(prefill, false, 400));
  prefill.engine().release(published);  // it has ended

  // While decode fetches, at any moment: it has the right answer or an error, and nobody keeps a block.
  std::mt19937 random(11);
  for (size_t i = 0; i < requests_.size(); ++i) {
    TokenRequest to_decode = requests_[i];
    to_decode.kv_transfer = publish(requests_[i]);
    Collector decoded;
    decode.engine().submit(to_decode, decoded.sink());
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 400));
    prefill.engine().release(*to_decode.kv_transfer);
    const Answer answer = decoded.wait();
    EXPECT_TRUE(answer == expected_[i] || !answer.error.empty()) << "request " << i;
  }
  EXPECT_TRUE(has_pinned_within(prefill, false, 400));
  EXPECT_TRUE(has_pinned_within(decode, false, 400));
}

// Shared prefixes end inside blocks of the other side, and what was sent comes again when decode has it already.
TEST_P(Exactness, BetweenBlocksOfDifferentSizes) {
  struct Sizes {
    int64_t prefill;
    int64_t decode;
  };
  for (const Sizes sizes : {Sizes{64, 16}, Sizes{16, 64}, Sizes{16, 32}, Sizes{5, 16}}) {
    const std::string what = fmt::format("blocks of {} to {}", sizes.prefill, sizes.decode);
    RankSetup setup;
    setup.max_num_seqs = 8;
    setup.max_num_batched_tokens = 40;
    setup.prefix_caching = true;
    setup.block_size = sizes.prefill;
    setup.num_blocks = 16 * kMaxModelLen / sizes.prefill;
    setup.kv_role = KvRole::kProducer;
    Rank prefill(GetParam(), setup);
    setup.block_size = sizes.decode;
    setup.num_blocks = 16 * kMaxModelLen / sizes.decode;
    setup.kv_role = KvRole::kConsumer;
    Rank decode(GetParam(), setup);
    std::vector<Answer> firsts;
    expect_same(push_all(prefill, decode, requests_, firsts), what + ", push");
    const double hits = decode.metric("vllm:prefix_cache_hits_total");
    expect_same(pull_all(prefill, decode, requests_), what + ", pull");
    EXPECT_GT(decode.metric("vllm:prefix_cache_hits_total"), hits);
    EXPECT_EQ(decode.metric("tandem:kv_blocks_pinned"), 0);
  }
}

// The same of every integer format: alone and whole, or together, in small steps, on two threads.
class QuantisedExactness : public testing::TestWithParam<model::QuantizationRequest> {};

TEST_P(QuantisedExactness, BatchesChunksAndThreads) {
  for (const char* path : {"models/demo", "tests/golden/qwen_base"}) {
    const ModelSetup model{path};
    RankSetup setup;
    setup.quantization = GetParam();
    Rank alone(model, setup);
    const std::vector<TokenRequest> requests = make_requests(alone.vocab_size(), kNumQuantisedPrompts);
    const std::vector<Answer> expected = run_all(alone, requests, 1);
    for (const Answer& answer : expected) ASSERT_EQ(answer.error, "");
    setup.threads = 2;
    setup.max_num_seqs = 16;
    setup.max_num_batched_tokens = 23;
    Rank together(model, setup);
    EXPECT_TRUE(run_all(together, requests, 16) == expected) << path;
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, QuantisedExactness,
                         testing::Values(model::QuantizationRequest{"wint8", 0}, model::QuantizationRequest{"wint4", 0},
                                         model::QuantizationRequest{"w8a8", 0}, model::QuantizationRequest{"w4a8", 0},
                                         model::QuantizationRequest{"wint4", 32},
                                         model::QuantizationRequest{"w4a8", 0, "int4"}),
                         [](const testing::TestParamInfo<model::QuantizationRequest>& test) {
                           return fmt::format("{}_g{}_head_{}", test.param.name, test.param.group_size,
                                              test.param.lm_head);
                         });

INSTANTIATE_TEST_SUITE_P(Models, Exactness,
                         testing::Values(ModelSetup{"models/demo"}, ModelSetup{"tests/golden/qwen_base"},
                                         ModelSetup{"tests/golden/ds_yarn"},
                                         ModelSetup{"models/demo", model::KvCacheType::kF8E4M3},
                                         ModelSetup{"tests/golden/qwen_base", model::KvCacheType::kF8E4M3}),
                         [](const testing::TestParamInfo<ModelSetup>& setup) { return name_of(setup.param); });

}  // namespace
}  // namespace tandem::engine
