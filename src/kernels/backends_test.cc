// The list of backends, what all of them must survive, and the thread pool.
#include <gmock/gmock.h>

#include <atomic>
#include <thread>

#include "src/kernels/cpu/thread_pool.h"
#include "src/kernels/test_support.h"

namespace tandem::kernels {
namespace {

TEST(Backends, TheReferenceIsAlwaysThereAndLast) {
  const std::vector<std::string> names = available_backends();
  ASSERT_FALSE(names.empty());
  EXPECT_EQ(names.back(), "ref");
  for (const std::string& name : names) {
    Result<std::unique_ptr<Ops>> ops = make_ops(name, 1);
    ASSERT_TRUE(ops.ok()) << name;
    EXPECT_EQ((*ops)->name(), name);
    EXPECT_EQ((*ops)->num_threads(), 1);
  }
  EXPECT_EQ((*make_ops("auto", 1))->name(), names.front());
}

TEST(Backends, ErrorsListThePossible) {
  const Result<std::unique_ptr<Ops>> ops = make_ops("cpu-avx9000", 1);
  ASSERT_FALSE(ops.ok());
  EXPECT_EQ(ops.error().kind, ErrorKind::kInvalidArgument);
  EXPECT_THAT(ops.error().message, testing::HasSubstr("cpu-avx9000"));
  EXPECT_THAT(ops.error().message, testing::HasSubstr("ref"));
  EXPECT_FALSE(make_ops("auto", -1).ok());
  EXPECT_FALSE(make_ops("auto", 100000).ok());
}

class EmptyTest : public BackendTest {};

TEST_P(EmptyTest, ZeroRowsAreHarmless) {
  Device device(name(), 2);
  Ops& ops = device.ops();
  Stream& stream = device.stream();
  const std::unique_ptr<Buffer> nothing = ops.allocate(0);
  const std::unique_ptr<Weight> square = device.pack(Matrix<float>(8, 8), kBf16Weights);
  const std::unique_ptr<Weight> gate_up = device.pack(Matrix<float>(16, 8), kBf16Weights);
  const auto empty = [](DType dtype, int64_t cols) { return Tensor{nullptr, dtype, 0, cols, cols}; };
  const Tensor x = empty(DType::kF32, 8);
  const Tensor column = empty(DType::kI32, 1);
  const Tensor weight = device.put(Matrix<float>(1, 8));
  const Tensor offsets = device.put_column<int32_t>({0, 0});
  const KvLayerView cache{nothing->address(), 1024, 4, 0, DType::kBf16};

  ops.embed(stream, *square, column, x);
  ops.rms_norm(stream, x, weight, 1e-6F, x);
  ops.add_rms_norm(stream, x, x, weight, 1e-6F, x);
  ops.add(stream, x, x);
  ops.linear(stream, x, *square, x);
  ops.head_linear(stream, x, 0, *square, x, 8);
  ops.rope(stream, x, 1, 8, 8, column, device.put(Matrix<float>(1, 8)), true);
  ops.write_kv(stream, x, x, 2, empty(DType::kI64, 1), cache);
  ops.write_latent(stream, x, x, empty(DType::kI64, 1), cache);
  ops.attention(stream, x, 2, 1, 1.0F, {}, column, cache, x);
  const std::vector<SequenceRows> no_rows(1);
  ops.attention(stream, x, 2, 1, 1.0F, no_rows, column, cache, x);
  ops.mla_attention_absorbed(stream, x, x, 4, 2, 1.0F, {}, column, cache, x);
  ops.mla_attention_expanded(stream, empty(DType::kF32, 12), empty(DType::kF32, 16), empty(DType::kF32, 2), 2, 4, 4,
                             1.0F, 0, DType::kBf16, x);
  ops.gather_latent(stream, SequenceRows{}, column, cache, x, x);
  ops.silu_mul(stream, empty(DType::kF32, 16), x);
  ops.route(stream, x, Tensor{}, RouterParams{}, column, empty(DType::kF32, 1));
  ops.sort_by_expert(stream, column, 1, column, offsets);
  ops.expert_mlp(stream, x, column, offsets, 1, *gate_up, *square, x);
  const EncodedRows rows{empty(DType::kU8, ops.expert_row_bytes(RowFormat::kExact, kF32Weights, 8))};
  ops.encode_expert_rows(stream, x, kF32Weights, rows);
  ops.expert_mlp_encoded(stream, rows, column, offsets, 1, *gate_up, *square, nullptr, empty(DType::kI64, 1));
  ops.combine(stream, x, empty(DType::kF32, 1), x);
  ops.gather_rows(stream, x, column, x);
  ops.synchronize(stream);
  EXPECT_THAT(device.get<int32_t>(offsets).values, testing::ElementsAre(0, 0));
}

TEST_P(EmptyTest, MemoryIsZeroedAndAligned) {
  Device device(name());
  for (const int64_t bytes : {1, 100, 5 << 20}) {
    const std::unique_ptr<Buffer> buffer = device.ops().allocate(bytes);
    EXPECT_EQ(buffer->bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->address()) % 64, 0U);
    std::vector<std::byte> host(static_cast<size_t>(bytes), std::byte{1});
    device.ops().read_back(device.stream(), buffer->address(), host);
    EXPECT_EQ(std::count(host.begin(), host.end(), std::byte{0}), bytes);
  }
}

TANDEM_FOR_ALL_BACKENDS(EmptyTest);

using EmptyDeathTest = EmptyTest;

TEST_P(EmptyDeathTest, WrongShapesAreBugs) {
  Device device(name());
  const std::unique_ptr<Weight> weight = device.pack(Matrix<float>(4, 8), kF32Weights);
  const Tensor x = device.make_f32(1, 7);
  const Tensor out = device.make_f32(1, 4);
  EXPECT_DEATH(device.ops().linear(device.stream(), x, *weight, out), "7 vs 8");
  EXPECT_DEATH(device.ops().embed(device.stream(), *weight, device.put_column<int32_t>({4}), device.make_f32(1, 8)),
               "token id is 4");
}

TANDEM_FOR_ALL_BACKENDS(EmptyDeathTest);

TEST(ThreadPool, EveryIndexRunsOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    cpu::ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (const int64_t count : {0, 1, 2, 5, 1000}) {
      std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
      std::atomic<bool> worker_in_range = true;
      pool.run(count, [&](int64_t index, int worker) {
        ++seen[static_cast<size_t>(index)];
        if (worker < 0 || worker >= threads) worker_in_range = false;
      });
      for (const std::atomic<int>& times : seen) EXPECT_EQ(times.load(), 1);
      EXPECT_TRUE(worker_in_range.load());
    }
  }
}

// Many short loops back to back: a thread that comes late to one loop must not touch the next.
TEST(ThreadPool, ShortLoopsDoNotMix) {
  cpu::ThreadPool pool(4);
  for (int64_t round = 0; round < 5000; ++round) {
    const int64_t count = 1 + round % 7;
    std::atomic<int64_t> sum = 0;
    pool.run(count, [&](int64_t index, int /*worker*/) { sum += index + round; });
    ASSERT_EQ(sum.load(), count * (count - 1) / 2 + count * round);
  }
}

TEST(ThreadPool, SleepsAndWakes) {
  cpu::ThreadPool pool(3);
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // far beyond the spinning time
    std::atomic<int> runs = 0;
    pool.run(6, [&](int64_t /*index*/, int /*worker*/) { ++runs; });
    ASSERT_EQ(runs.load(), 6);
  }
}

TEST(ThreadPool, CallersTakeTurns) {
  cpu::ThreadPool pool(2);
  std::atomic<int64_t> total = 0;
  const auto call = [&] {
    for (int i = 0; i < 300; ++i) pool.run(10, [&](int64_t index, int /*worker*/) { total += index; });
  };
  std::thread other(call);
  call();
  other.join();
  EXPECT_EQ(total.load(), 2 * 300 * 45);
}

}  // namespace
}  // namespace tandem::kernels
