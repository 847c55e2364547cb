// How fast KV moves between two processes of this machine, for each transport and block size, beside what the machine
// can do: a copy in memory in pieces of the same size, and plain sockets.
//
// Every round measures all of one block size right after each other, so that what disturbs the machine disturbs all of
// them; shares are taken within a round, and the median of the rounds is reported.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/comm/transport.h"
#include "src/transfer/agent.h"

namespace tandem::bench {

struct KvBenchOptions {
  std::vector<comm::Transport> transports;
  std::vector<int64_t> block_bytes;  // of one layer; multiples of 64
  transfer::KvChecksum checksum = transfer::KvChecksum::kAuto;
  int64_t num_rounds = 5;
  int64_t total_bytes = int64_t{1} << 30;     // moved per measurement
  int64_t memory_bytes = int64_t{64} << 20;  // of each side: what is copied lies in memory, not in a cache
};

struct KvBenchCell {
  comm::Transport transport = comm::Transport::kAuto;
  double gb_per_s = 0;
  double share_of_copy = 0;    // of the copy in the same pieces
  double share_of_socket = 0;  // of the plain sockets
  double block_us = 0;         // one block, from the call to Done: median
  double block_p99_us = 0;
};

struct KvBenchRow {
  int64_t block_bytes = 0;
  double copy_gb_per_s = 0;    // memcpy of blocks to and from shuffled places
  double socket_gb_per_s = 0;  // kSockets streams, each with a thread on both sides
  std::vector<KvBenchCell> cells;
};

inline constexpr int kSockets = 4;

// Starts child processes by fork(); the calling process must have one thread only. A transfer that fails stops the
// process.
std::vector<KvBenchRow> run_kv_bench(const KvBenchOptions& options);

std::string kv_report_as_text(const KvBenchOptions& options, const std::vector<KvBenchRow>& rows);
std::string kv_report_as_json(const KvBenchOptions& options, const std::vector<KvBenchRow>& rows);

}  // namespace tandem::bench
