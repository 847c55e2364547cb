// tandem bench kv: the transfer of KV blocks by itself, between two processes of this machine.
#include <cstdio>
#include <fstream>

#include "src/base/log.h"
#include "src/bench/kv_bench.h"
#include "src/commands/client_common.h"
#include "src/commands/commands.h"

namespace tandem::commands {
namespace {

constexpr int64_t kBlockStep = 64;                    // sizes are multiples of it
constexpr int64_t kMaxBlockBytes = int64_t{16} << 20;

Result<bench::KvBenchOptions> read_options(const Options& options) {
  bench::KvBenchOptions bench;
  for (const std::string& name : options.list("transports")) {
    const std::optional<comm::Transport> transport = comm::parse_transport(name);
    if (!transport.has_value()) {
      return invalid_argument("transports", "--transports: '{}' is none of auto, shm, tcp, ucx, ucx_tcp", name);
    }
    bench.transports.push_back(*transport);
  }
  for (const std::string& text : options.list("block-bytes")) {
    char* end = nullptr;
    const int64_t bytes = std::strtoll(text.c_str(), &end, 10);
    if (*end != '\0' || bytes < kBlockStep || bytes > kMaxBlockBytes || bytes % kBlockStep != 0) {
      return invalid_argument("block-bytes", "--block-bytes: '{}' is no multiple of {} up to {}", text, kBlockStep,
                              kMaxBlockBytes);
    }
    bench.block_bytes.push_back(bytes);
  }
  if (bench.transports.empty()) {
    bench.transports = {comm::Transport::kSharedMemory, comm::Transport::kTcp, comm::Transport::kUcx,
                        comm::Transport::kUcxTcp};
  }
  if (bench.block_bytes.empty()) bench.block_bytes = {4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20};
  const std::string& sums = options.text("kv-checksum");
  bench.checksum = sums == "auto" ? transfer::KvChecksum::kAuto
                   : sums == "on" ? transfer::KvChecksum::kOn
                                  : transfer::KvChecksum::kOff;
  bench.num_rounds = options.integer("num-rounds");
  return bench;
}

}  // namespace

int run_bench_kv(const Options& options) {
  init_log(LogLevel::kError, "bench");
  const Result<bench::KvBenchOptions> bench = read_options(options);
  if (!bench.ok()) return fail_with(bench.error());
  const std::vector<bench::KvBenchRow> rows = bench::run_kv_bench(*bench);
  std::fputs(bench::kv_report_as_text(*bench, rows).c_str(), stdout);
  const std::string& path = options.text("output-json");
  if (path.empty()) return 0;
  std::ofstream file(path);
  file << bench::kv_report_as_json(*bench, rows) << "\n";
  file.close();
  if (!file) return fail_with(make_error(ErrorKind::kUnavailable, "{}: cannot be written; check --output-json", path));
  return 0;
}

}  // namespace tandem::commands
