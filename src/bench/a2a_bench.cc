#include "src/bench/a2a_bench.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "src/base/clock.h"
#include "src/bench/a2a_rank.h"
#include "src/bench/pinned_process.h"
#include "src/comm/shared_region.h"
#include "src/ep/exchange.h"
#include "src/group/mapped_fabric.h"
#include "src/kernels/ops.h"

namespace tandem::bench {
namespace {

using comm::SharedRegion;

// A rank that does nothing for so long is dead.
constexpr int64_t kRankTimeoutUs = 60'000'000;

// What all ranks map; they inherit it.
struct SharedMemory {
  std::vector<SharedRegion> windows;
  std::vector<SharedRegion> bells;
  std::vector<SharedRegion> records;
  SharedRegion board;
};

Result<SharedMemory> make_memory(int64_t ranks, int64_t window_bytes) {
  SharedMemory memory;
  const int64_t region_bytes = group::MappedFabric::region_bytes(static_cast<int32_t>(ranks), window_bytes);
  for (int64_t r = 0; r < ranks; ++r) {
    TANDEM_ASSIGN(SharedRegion window, SharedRegion::create("window", region_bytes));
    TANDEM_ASSIGN(SharedRegion bell, SharedRegion::create("bell", comm::Bell::kBytes));
    TANDEM_ASSIGN(SharedRegion record, SharedRegion::create("record", sizeof(A2aRecord)));
    memory.windows.push_back(std::move(window));
    memory.bells.push_back(std::move(bell));
    memory.records.push_back(std::move(record));
  }
  TANDEM_ASSIGN(memory.board, SharedRegion::create("board", sizeof(A2aBoard)));
  return memory;
}

// In a child process. Where more kinds of fabric can be measured, here is the place to choose among them.
int run_rank(const A2aRankOptions& options, SharedMemory& memory, int64_t window_bytes, int32_t rank) {
  const int32_t ranks = static_cast<int32_t>(memory.windows.size());
  std::vector<group::MappedRank> mapped;
  for (int32_t r = 0; r < ranks; ++r) {
    mapped.push_back({memory.windows[static_cast<size_t>(r)].data(), memory.bells[static_cast<size_t>(r)].data()});
  }
  const SteadyClock clock;
  group::MappedFabric fabric(group::RankId(rank), group::Epoch(1), mapped, window_bytes,
                             group::FabricLimits{.rank_timeout_us = kRankTimeoutUs}, clock);
  const std::vector<int> cpus = usable_cpus();
  pin_this_thread(cpus[static_cast<size_t>(rank) % cpus.size()]);  // the fabric has seen all processors
  const Status status = run_a2a_rank(options, fabric, *reinterpret_cast<A2aBoard*>(memory.board.data()),
                                     *reinterpret_cast<A2aRecord*>(memory.records[static_cast<size_t>(rank)].data()));
  if (!status.ok()) std::fprintf(stderr, "rank %d: %s\n", rank, status.error().message.c_str());
  return status.ok() ? 0 : 1;
}

Status run_ranks(const A2aRankOptions& options, SharedMemory& memory, int64_t window_bytes) {
  std::vector<pid_t> children;
  for (int32_t r = 0; r < static_cast<int32_t>(memory.windows.size()); ++r) {
    const pid_t pid = ::fork();
    if (pid == 0) ::_exit(run_rank(options, memory, window_bytes, r));
    if (pid > 0) children.push_back(pid);
  }
  bool is_good = children.size() == memory.windows.size();
  if (!is_good) {  // the others wait for those that are not there
    for (const pid_t pid : children) ::kill(pid, SIGKILL);
  }
  for (size_t left = children.size(); left > 0; --left) {
    int how = 0;
    const pid_t ended = ::waitpid(-1, &how, 0);
    const bool was_good = WIFEXITED(how) && WEXITSTATUS(how) == 0;
    if (!was_good && is_good) {
      for (const pid_t pid : children) {
        if (pid != ended) ::kill(pid, SIGKILL);
      }
    }
    is_good = is_good && was_good;
  }
  if (is_good) return {};
  return make_error(ErrorKind::kInternal, "a rank of the measurement failed; its reason stands above");
}

double median_of(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + std::ssize(values) / 2, values.end());
  return values[values.size() / 2];
}

}  // namespace

Result<A2aLine> measure_a2a(const A2aBenchOptions& options, ep::All2All backend, int64_t ranks, int64_t tokens) {
  TANDEM_ASSIGN(const std::unique_ptr<kernels::Ops> ops, kernels::make_ops("auto", 1));
  const int64_t window_bytes =
      ep::Exchange::window_bytes(a2a_exchange_options(options, backend, ranks, tokens), *ops,
                                 a2a_shape(options, tokens), static_cast<int32_t>(ranks));
  TANDEM_ASSIGN(SharedMemory memory, make_memory(ranks, window_bytes));
  const A2aRankOptions rank_options{&options, backend, tokens};
  TANDEM_TRY(run_ranks(rank_options, memory, window_bytes));

  A2aLine line;
  line.backend = backend;
  line.ranks = ranks;
  line.tokens = tokens;
  line.rounds = reinterpret_cast<const A2aBoard*>(memory.board.data())->rounds;
  line.window_mib = static_cast<double>(window_bytes) / (1 << 20);
  std::vector<double> times[kNumA2aPhases];
  for (int64_t round = 0; round < line.rounds; ++round) {
    for (size_t phase = 0; phase < kNumA2aPhases; ++phase) {
      double slowest = 0;
      for (const SharedRegion& region : memory.records) {
        slowest = std::max(slowest, reinterpret_cast<const A2aRecord*>(region.data())->us[round][phase]);
      }
      times[phase].push_back(slowest);
    }
  }
  line.dispatch.us = median_of(times[kA2aDispatch]);
  line.dispatch.memcpy_us = median_of(times[kA2aCopyDispatch]);
  line.encode_us = median_of(times[kA2aEncode]);
  line.combine.us = median_of(times[kA2aCombine]);
  line.combine.memcpy_us = median_of(times[kA2aCopyCombine]);
  for (const SharedRegion& region : memory.records) {
    const A2aRecord& record = *reinterpret_cast<const A2aRecord*>(region.data());
    CHECK(record.is_done);
    line.dispatch.bytes += static_cast<double>(record.dispatch_bytes) / static_cast<double>(ranks);
    line.combine.bytes += static_cast<double>(record.combine_bytes) / static_cast<double>(ranks);
  }
  for (A2aTimes* direction : {&line.dispatch, &line.combine}) {
    direction->ratio = direction->memcpy_us > 0 ? direction->us / direction->memcpy_us : 0;
  }
  return line;
}

std::string a2a_heading() {
  return "| backend | over | ranks | tokens | dispatch us | of it encoding | GB/s | memcpy us | ratio | combine us | GB/s "
         "| memcpy us | ratio | both, ratio | window MiB | rounds |\n"
         "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
}

std::string a2a_line_as_text(const A2aLine& line) {
  const double copied_us = line.dispatch.memcpy_us + line.combine.memcpy_us;
  const double both = copied_us > 0 ? (line.dispatch.us + line.combine.us) / copied_us : 0;
  return fmt::format("| {} | shm | {} | {} | {:.1f} | {:.1f} | {:.2f} | {:.1f} | {:.2f} | {:.1f} | {:.2f} | {:.1f} | {:.2f} | "
                     "{:.2f} | {:.1f} | {} |\n",
                     ep::all2all_name(line.backend), line.ranks, line.tokens, line.dispatch.us, line.encode_us,
                     line.dispatch.gbytes(), line.dispatch.memcpy_us, line.dispatch.ratio, line.combine.us,
                     line.combine.gbytes(), line.combine.memcpy_us, line.combine.ratio, both, line.window_mib,
                     line.rounds);
}

}  // namespace tandem::bench
