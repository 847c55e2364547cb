#include "src/bench/a2a_group.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <thread>

#include "src/base/clock.h"
#include "src/bench/pinned_process.h"
#include "src/group/epoch_memory.h"
#include "src/group/network_fabric.h"
#include "src/kernels/ops.h"

namespace tandem::bench {
namespace {

using comm::SharedRegion;
using group::RankId;

// A rank that does nothing for so long is dead.
constexpr int64_t kRankTimeoutUs = 60'000'000;
constexpr int64_t kLookUs = 1'000;  // at what others have not written yet
constexpr char kHost[] = "127.0.0.1";

void pin_rank(int32_t rank) {
  const std::vector<int> cpus = usable_cpus();
  pin_this_thread(cpus[static_cast<size_t>(rank) % cpus.size()]);
}

// Runs `body` in a process for each rank, and fails if one of them does.
Status run_processes(int64_t ranks, const std::function<Status(int32_t rank)>& body) {
  std::vector<pid_t> children;
  for (int32_t r = 0; r < ranks; ++r) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      const Status status = body(r);
      if (!status.ok()) std::fprintf(stderr, "rank %d: %s\n", r, status.error().message.c_str());
      ::_exit(status.ok() ? 0 : 1);
    }
    if (pid > 0) children.push_back(pid);
  }
  bool is_good = std::ssize(children) == ranks;
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

// ---- Shared memory -------------------------------------------------------------------------------------------------

// What all ranks map; they inherit it.
struct Windows {
  std::vector<SharedRegion> windows;
  std::vector<SharedRegion> bells;
};

Result<Windows> make_windows(int64_t ranks, int64_t window_bytes) {
  Windows memory;
  const int64_t region_bytes = group::MappedFabric::region_bytes(static_cast<int32_t>(ranks), window_bytes);
  for (int64_t r = 0; r < ranks; ++r) {
    TANDEM_ASSIGN(SharedRegion window, SharedRegion::create("window", region_bytes));
    TANDEM_ASSIGN(SharedRegion bell, SharedRegion::create("bell", comm::Bell::kBytes));
    memory.windows.push_back(std::move(window));
    memory.bells.push_back(std::move(bell));
  }
  return memory;
}

Status run_mapped_rank(const A2aRankOptions& options, const Windows& memory, int64_t window_bytes, int32_t rank,
                       A2aBoard& board, A2aRecord& record) {
  std::vector<group::MappedRank> mapped;
  for (size_t r = 0; r < memory.windows.size(); ++r) mapped.push_back({memory.windows[r].data(), memory.bells[r].data()});
  const SteadyClock clock;
  group::MappedFabric fabric(RankId(rank), group::Epoch(1), mapped, window_bytes,
                             group::FabricLimits{.rank_timeout_us = kRankTimeoutUs}, clock);
  pin_rank(rank);  // the fabric has seen all processors
  const std::unique_ptr<kernels::Ops> ops = kernels::make_ops("auto", 1).value();
  const std::unique_ptr<PlainCopy> plain =
      copy_by_memory(fabric, a2a_outputs_offset(options, *ops, std::ssize(memory.windows)));
  return run_a2a_rank(options, fabric, *plain, board, record);
}

// ---- TCP -----------------------------------------------------------------------------------------------------------

// Where ranks read how the others are reached.
struct AddressBook {
  std::atomic<int64_t> num_written;
  char addresses[group::kMaxRanks][group::kMaxNetworkBytes + 1];
};

// Nobody goes on before all have written theirs.
Status exchange_addresses(AddressBook& book, int32_t rank, int32_t size, const std::string& own) {
  std::copy(own.begin(), own.end(), book.addresses[rank]);  // the book is zeroed
  book.num_written.fetch_add(1);
  for (int64_t waited_us = 0; book.num_written.load() < size; waited_us += kLookUs) {
    if (waited_us > kRankTimeoutUs) return make_error(ErrorKind::kUnavailable, "not all ranks have begun");
    std::this_thread::sleep_for(std::chrono::microseconds(kLookUs));
  }
  return {};
}

Status run_tcp_rank(const A2aRankOptions& options, AddressBook& book, const SocketMesh& sockets, int64_t window_bytes,
                    int32_t rank, int32_t size, A2aBoard& board, A2aRecord& record) {
  const SteadyClock clock;
  TANDEM_ASSIGN(const SharedRegion bell, SharedRegion::create("bell", comm::Bell::kBytes));
  TANDEM_ASSIGN(const auto memory, group::EpochMemory::make(RankId(rank), size, window_bytes, bell));
  TANDEM_ASSIGN(const auto port,
                group::NetworkPort::open({.host = kHost,
                                          .rank = RankId(rank),
                                          .size = size,
                                          .region = memory->region(),
                                          .window = group::MappedFabric::window_in(memory->region(), size, window_bytes),
                                          .bell = bell.data(),
                                          .rank_timeout_us = kRankTimeoutUs,
                                          .on_outcome = [&bell] { comm::Bell(bell.data()).ring(); }}));
  TANDEM_TRY(exchange_addresses(book, rank, size, port->address()));
  std::vector<group::NetworkPeer> peers;
  std::vector<bool> is_remote(static_cast<size_t>(size), true);
  is_remote[static_cast<size_t>(rank)] = false;
  for (int32_t r = 0; r < size; ++r) {
    if (r == rank) continue;
    memory->stand_in(RankId(r));
    peers.push_back({RankId(r), book.addresses[r],
                     &group::MappedFabric::pulse_in(memory->ranks()[static_cast<size_t>(r)].region)});
  }
  TANDEM_TRY(port->connect(std::move(peers)));
  comm::Bell own_bell(bell.data());
  std::optional<group::NetworkPort::Outcome> outcome;
  while (!outcome) {
    const uint32_t rung = own_bell.count();
    outcome = port->outcome();
    if (!outcome) own_bell.wait(rung, kRankTimeoutUs);
  }
  if (outcome->error) return *outcome->error;
  group::FabricLimits limits{.rank_timeout_us = kRankTimeoutUs};
  // The fabric does not know that the others are on this host, too: a wait that looks needs a processor for each thread.
  if (std::ssize(usable_cpus()) < 2 * size) limits.spin_us = 0;
  group::NetworkFabric fabric(RankId(rank), group::Epoch(1), memory->ranks(), is_remote, window_bytes, limits, clock, *port);
  pin_rank(rank);  // not the port's thread, which goes where there is room
  const std::unique_ptr<PlainCopy> plain = copy_by_sockets(sockets.sockets_of(static_cast<size_t>(rank)));
  return run_a2a_rank(options, fabric, *plain, board, record);
}

}  // namespace

Result<A2aGroup> A2aGroup::run(const A2aRankOptions& options, A2aOver over, int64_t ranks, int64_t window_bytes) {
  A2aGroup group;
  TANDEM_ASSIGN(group.board_, SharedRegion::create("board", sizeof(A2aBoard)));
  for (int64_t r = 0; r < ranks; ++r) {
    TANDEM_ASSIGN(SharedRegion record, SharedRegion::create("record", sizeof(A2aRecord)));
    group.records_.push_back(std::move(record));
  }
  A2aBoard& board = *reinterpret_cast<A2aBoard*>(group.board_.data());
  const auto record = [&group](int32_t rank) -> A2aRecord& {
    return *reinterpret_cast<A2aRecord*>(group.records_[static_cast<size_t>(rank)].data());
  };
  if (over == A2aOver::kSharedMemory) {
    TANDEM_ASSIGN(const Windows windows, make_windows(ranks, window_bytes));
    TANDEM_TRY(run_processes(ranks, [&](int32_t rank) {
      return run_mapped_rank(options, windows, window_bytes, rank, board, record(rank));
    }));
  } else {
    TANDEM_ASSIGN(const SocketMesh sockets, SocketMesh::connect(ranks));
    TANDEM_ASSIGN(const SharedRegion book, SharedRegion::create("addresses", sizeof(AddressBook)));
    TANDEM_TRY(run_processes(ranks, [&](int32_t rank) {
      return run_tcp_rank(options, *reinterpret_cast<AddressBook*>(book.data()), sockets, window_bytes, rank,
                          static_cast<int32_t>(ranks), board, record(rank));
    }));
  }
  return group;
}

}  // namespace tandem::bench
