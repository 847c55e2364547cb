// Loops that do nothing but what a kernel is limited by, to measure the machine's limits. Included by isa_*.cc after
// its simd_*.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tandem::kernels::cpu {
namespace {

// 12 independent chains, more than FMA latency (4) times units (2), and all different, or the compiler would keep one.
float run_fma(int64_t rounds) {
  Vec a = broadcast(0.1F), b = broadcast(0.2F), c = broadcast(0.3F), d = broadcast(0.4F);
  Vec e = broadcast(0.5F), f = broadcast(0.6F), g = broadcast(0.7F), h = broadcast(0.8F);
  Vec i = broadcast(0.9F), j = broadcast(1.1F), k = broadcast(1.2F), l = broadcast(1.3F);
  const Vec x = broadcast(0.999F);
  const Vec y = broadcast(0.001F);
  for (int64_t round = 0; round < rounds; ++round) {
    a = fma(a, x, y), b = fma(b, x, y), c = fma(c, x, y), d = fma(d, x, y), e = fma(e, x, y), f = fma(f, x, y);
    g = fma(g, x, y), h = fma(h, x, y), i = fma(i, x, y), j = fma(j, x, y), k = fma(k, x, y), l = fma(l, x, y);
  }
  const Vec sums = add(add(add(a, b), add(c, d)), add(add(e, f), add(g, h)));
  return sum_lanes(add(sums, add(add(i, j), add(k, l))));
}
constexpr int64_t kFmaFlopsPerRound = 12 * kLanes * 2;

// The same with products of bytes; without VNNI these are the nibbles of whole bytes.
int32_t run_dot(int64_t rounds) {
  IntVec sums[12];
  for (int i = 0; i < 12; ++i) sums[i] = int_broadcast(i);
  IntVec codes = int_broadcast(0x01020304);
  const IntVec x = int_broadcast(0x02030405);
  for (int64_t round = 0; round < rounds; ++round) {
    asm("" : "+x"(codes));  // or the compiler would take a product out of the loop
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = dot_bytes(sums[i], split_bytes(codes), x);
  }
  for (int i = 1; i < 12; ++i) sums[0] = int_add(sums[0], sums[i]);
  return sum_int_lanes(sums[0]);
}
constexpr int64_t kDotOpsPerRound = 12 * 4 * kLanes * 2;

// Four streams, as a matrix product with one row reads its panels: more than one keeps more requests under way.
float run_read(const std::byte* memory, int64_t bytes) {
  const float* values = reinterpret_cast<const float*>(memory);
  const int64_t quarter = bytes / int64_t{sizeof(float)} / 4 / (2 * kLanes) * (2 * kLanes);
  Vec a = zero(), b = a, c = a, d = a;
  for (int64_t i = 0; i < quarter; i += 2 * kLanes) {
    const float* p = values + i;
    a = max(max(a, load(p)), load(p + kLanes));
    b = max(max(b, load(p + quarter)), load(p + quarter + kLanes));
    c = max(max(c, load(p + 2 * quarter)), load(p + 2 * quarter + kLanes));
    d = max(max(d, load(p + 3 * quarter)), load(p + 3 * quarter + kLanes));
  }
  return max_lanes(max(max(a, b), max(c, d)));
}

}  // namespace
}  // namespace tandem::kernels::cpu
