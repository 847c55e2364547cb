// What one rank does in `tandem bench a2a`.
#pragma once

#include <atomic>

#include "src/bench/a2a_bench.h"
#include "src/bench/a2a_copy.h"
#include "src/group/fabric.h"

namespace tandem::bench {

inline constexpr int64_t kMaxA2aRounds = 2000;
inline constexpr int64_t kMinA2aRounds = 15;
inline constexpr int64_t kA2aWarmups = 3;

enum A2aPhase : uint8_t { kA2aDispatch, kA2aEncode, kA2aCombine, kA2aPlainDispatch, kA2aPlainCombine };
inline constexpr int64_t kNumA2aPhases = 5;

// Shared by the ranks of one measurement.
struct A2aBoard {
  std::atomic<int64_t> arrived;  // at start lines, all together
  std::atomic<bool> stop;        // rank 0: no more rounds
  std::atomic<int64_t> rounds;
};
// Of one rank, in shared memory.
struct A2aRecord {
  bool is_done;
  int64_t dispatch_bytes;  // sent
  int64_t combine_bytes;
  double us[kMaxA2aRounds][kNumA2aPhases];
};

struct A2aRankOptions {
  const A2aBenchOptions* bench = nullptr;
  ep::All2All backend = ep::All2All::kAllGather;
  int64_t tokens = 0;
};

model::ExchangeShape a2a_shape(const A2aBenchOptions& options, int64_t tokens);
ep::ExchangeOptions a2a_exchange_options(const A2aBenchOptions& options, ep::All2All backend, int64_t ranks,
                                         int64_t tokens);
// Where the outputs begin in the windows of that exchange: plain copies go there.
int64_t a2a_outputs_offset(const A2aRankOptions& options, const kernels::Ops& ops, int64_t ranks);
// Runs rounds until the time is up. A wrong output is a failed CHECK.
Status run_a2a_rank(const A2aRankOptions& options, group::Fabric& fabric, PlainCopy& plain, A2aBoard& board,
                    A2aRecord& record);

}  // namespace tandem::bench
