#include "src/bench/a2a_bench.h"

#include <algorithm>

#include "src/bench/a2a_group.h"
#include "src/ep/exchange.h"
#include "src/kernels/ops.h"

namespace tandem::bench {
namespace {

double median_of(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + std::ssize(values) / 2, values.end());
  return values[values.size() / 2];
}

}  // namespace

const char* a2a_over_name(A2aOver over) { return over == A2aOver::kTcp ? "tcp" : "shm"; }

Result<A2aOver> parse_a2a_over(std::string_view name) {
  for (const A2aOver over : {A2aOver::kSharedMemory, A2aOver::kTcp}) {
    if (name == a2a_over_name(over)) return over;
  }
  return invalid_argument("over", "--over {}: give shm or tcp, or both with a comma", name);
}

Result<A2aLine> measure_a2a(const A2aBenchOptions& options, A2aOver over, ep::All2All backend, int64_t ranks,
                            int64_t tokens) {
  TANDEM_ASSIGN(const std::unique_ptr<kernels::Ops> ops, kernels::make_ops("auto", 1));
  const int64_t window_bytes =
      ep::Exchange::window_bytes(a2a_exchange_options(options, backend, ranks, tokens), *ops,
                                 a2a_shape(options, tokens), static_cast<int32_t>(ranks));
  const A2aRankOptions rank_options{&options, backend, tokens};
  TANDEM_ASSIGN(const A2aGroup group, A2aGroup::run(rank_options, over, ranks, window_bytes));

  A2aLine line;
  line.over = over;
  line.backend = backend;
  line.ranks = ranks;
  line.tokens = tokens;
  line.rounds = group.board().rounds;
  line.window_mib = static_cast<double>(window_bytes) / (1 << 20);
  std::vector<double> times[kNumA2aPhases];
  for (int64_t round = 0; round < line.rounds; ++round) {
    for (size_t phase = 0; phase < kNumA2aPhases; ++phase) {
      double slowest = 0;
      for (int64_t r = 0; r < ranks; ++r) slowest = std::max(slowest, group.record(r).us[round][phase]);
      times[phase].push_back(slowest);
    }
  }
  line.dispatch.us = median_of(times[kA2aDispatch]);
  line.dispatch.plain_us = median_of(times[kA2aPlainDispatch]);
  line.encode_us = median_of(times[kA2aEncode]);
  line.combine.us = median_of(times[kA2aCombine]);
  line.combine.plain_us = median_of(times[kA2aPlainCombine]);
  for (int64_t r = 0; r < ranks; ++r) {
    const A2aRecord& record = group.record(r);
    CHECK(record.is_done);
    line.dispatch.bytes += static_cast<double>(record.dispatch_bytes) / static_cast<double>(ranks);
    line.combine.bytes += static_cast<double>(record.combine_bytes) / static_cast<double>(ranks);
  }
  for (A2aTimes* direction : {&line.dispatch, &line.combine}) {
    direction->ratio = direction->plain_us > 0 ? direction->us / direction->plain_us : 0;
  }
  return line;
}

std::string a2a_heading() {
  return "| backend | over | ranks | tokens | dispatch us | of it encoding | GB/s | plain us | ratio | combine us | GB/s "
         "| plain us | ratio | both, ratio | window MiB | rounds |\n"
         "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
}

std::string a2a_line_as_text(const A2aLine& line) {
  const double plain_us = line.dispatch.plain_us + line.combine.plain_us;
  const double both = plain_us > 0 ? (line.dispatch.us + line.combine.us) / plain_us : 0;
  return fmt::format("| {} | {} | {} | {} | {:.1f} | {:.1f} | {:.2f} | {:.1f} | {:.2f} | {:.1f} | {:.2f} | {:.1f} | {:.2f} | "
                     "{:.2f} | {:.1f} | {} |\n",
                     ep::all2all_name(line.backend), a2a_over_name(line.over), line.ranks, line.tokens, line.dispatch.us, line.encode_us,
                     line.dispatch.gbytes(), line.dispatch.plain_us, line.dispatch.ratio, line.combine.us,
                     line.combine.gbytes(), line.combine.plain_us, line.combine.ratio, both, line.window_mib,
                     line.rounds);
}

}  // namespace tandem::bench
