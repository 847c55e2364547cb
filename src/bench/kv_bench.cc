#include "src/bench/kv_bench.h"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>

#include "src/base/clock.h"
#include "src/bench/kv_limits.h"
#include "src/kernels/ops.h"
#include "src/model/kv_cache.h"

namespace tandem::bench {
namespace {

constexpr int kLatencyTransfers = 100;  // per round
constexpr int64_t kBlockTokens = 16;
constexpr uint64_t kShuffleSeed = 7;

model::KvLayout make_layout(int64_t block_bytes) {
  model::KvLayout layout;
  layout.kind = model::KvKind::kMla;
  layout.num_layers = 1;
  layout.block_size = kBlockTokens;
  layout.bytes_per_token = block_bytes / kBlockTokens;
  layout.latent_dim = layout.bytes_per_token / 2;
  return layout;
}

// One side: a cache and an agent that is asked for Done events until there is one.
class Side {
 public:
  Side(const KvBenchOptions& options, comm::Transport transport, int64_t block_bytes)
      : layout(make_layout(block_bytes)),
        num_blocks(options.memory_bytes / block_bytes),
        ops_(kernels::make_ops("ref", 1).value()),
        cache_(*ops_, layout, num_blocks, comm::may_share_memory(transport)),
        order_(shuffled(num_blocks)) {
    std::memset(cache_.base(), 1, static_cast<size_t>(cache_.bytes()));
    CHECK_EQ(pipe(news_), 0);
    transfer::AgentOptions agent_options;
    agent_options.engine_id = "bench";
    agent_options.model_fingerprint = "bench";
    agent_options.transport = transport;
    agent_options.checksum = options.checksum;
    agent = transfer::make_agent(cache_, agent_options, [this] { CHECK_EQ(write(news_[1], "x", 1), 1); }).value();
  }
  ~Side() {
    agent.reset();
    close(news_[0]);
    close(news_[1]);
  }
  void wait_done() {
    while (true) {
      const std::vector<transfer::Done> done = agent->take_done();
      if (!done.empty()) {
        if (!done[0].status.ok()) fail_check(__FILE__, __LINE__, done[0].status.error().message);
        return;
      }
      char ignored = 0;
      CHECK_EQ(read(news_[0], &ignored, 1), 1);
    }
  }
  transfer::BlockSpan span(int64_t count) const {
    return {0, {order_.begin(), order_.begin() + count}, count * kBlockTokens};
  }

  const model::KvLayout layout;
  const int64_t num_blocks;
  std::unique_ptr<transfer::Agent> agent;

 private:
  // As in a cache that has been in use for a while.
  static std::vector<BlockId> shuffled(int64_t count) {
    std::vector<BlockId> blocks;
    for (int64_t i = 0; i < count; ++i) blocks.emplace_back(static_cast<int32_t>(i));
    std::mt19937_64 random(kShuffleSeed);
    std::shuffle(blocks.begin(), blocks.end(), random);
    return blocks;
  }

  std::unique_ptr<kernels::Ops> ops_;
  model::KvCache cache_;
  std::vector<BlockId> order_;
  int news_[2] = {-1, -1};
};

void read_all(int fd, void* data, size_t size) { CHECK_EQ(read(fd, data, size), static_cast<ssize_t>(size)); }
void write_all(int fd, const void* data, size_t size) { CHECK_EQ(write(fd, data, size), static_cast<ssize_t>(size)); }

constexpr size_t kHandleBytes = 128;

// The prefill side, in its own process: publishes what it is asked for and reports the handle.
[[noreturn]] void serve(const KvBenchOptions& options, comm::Transport transport, int64_t block_bytes, int in,
                        int out) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  {
    Side side(options, transport, block_bytes);
    const int64_t port = side.agent->port();
    write_all(out, &port, sizeof port);
    int64_t count = 0;
    for (uint64_t id = 1; read(in, &count, sizeof count) == sizeof count; ++id) {
      const std::string handle = side.agent->publish(transfer::TransferId(id), side.span(count));
      char text[kHandleBytes] = {};
      std::copy(handle.begin(), handle.end(), text);
      write_all(out, text, sizeof text);
      side.wait_done();
    }
  }
  _exit(0);
}

struct Measured {
  double gb_per_s = 0;
  std::vector<double> block_us;
};

// The decode side pulls, in this process.
Measured pull_from(const KvBenchOptions& options, comm::Transport transport, int64_t block_bytes, int to_child,
                   int from_child) {
  Side side(options, transport, block_bytes);
  transfer::KvTransferParams remote;
  remote.remote_host = "127.0.0.1";
  read_all(from_child, &remote.remote_port, sizeof remote.remote_port);
  const SteadyClock clock;
  uint64_t id = 1;
  const auto pull = [&](int64_t count) {
    char text[kHandleBytes];
    write_all(to_child, &count, sizeof count);
    read_all(from_child, text, sizeof text);
    remote.remote_request_id = text;
    const int64_t start_us = clock.now_us();
    side.agent->pull(transfer::TransferId(id++), remote, side.span(count), 0);
    side.wait_done();
    return static_cast<double>(clock.now_us() - start_us);
  };
  pull(1);
  pull(side.num_blocks);  // every page has been touched, and every window has grown
  Measured measured;
  double us = 0;
  int64_t bytes = 0;
  while (bytes < options.total_bytes) {
    us += pull(side.num_blocks);
    bytes += side.num_blocks * block_bytes;
  }
  measured.gb_per_s = static_cast<double>(bytes) / us * 1e-3;
  for (int i = 0; i < kLatencyTransfers; ++i) measured.block_us.push_back(pull(1));
  return measured;
}

Measured measure_transfers(const KvBenchOptions& options, comm::Transport transport, int64_t block_bytes) {
  int in[2];
  int out[2];
  CHECK_EQ(pipe(in), 0);
  CHECK_EQ(pipe(out), 0);
  const pid_t child = fork();
  CHECK_GE(child, 0);
  if (child == 0) {
    close(in[1]);
    serve(options, transport, block_bytes, in[0], out[1]);
  }
  close(in[0]);
  close(out[1]);
  Measured measured = pull_from(options, transport, block_bytes, in[1], out[0]);
  close(in[1]);
  close(out[0]);
  waitpid(child, nullptr, 0);
  return measured;
}

double percentile(std::vector<double> values, double share) {
  CHECK(!values.empty());
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<size_t>(share * static_cast<double>(values.size())))];
}

// What the rounds have brought for one transport.
struct Rounds {
  std::vector<double> gb_per_s, share_of_copy, share_of_socket, block_us;
};

KvBenchRow measure_row(const KvBenchOptions& options, int64_t block_bytes) {
  std::vector<double> copies;
  std::vector<double> sockets;
  std::vector<Rounds> rounds(options.transports.size());
  for (int64_t round = 0; round < options.num_rounds; ++round) {
    copies.push_back(measure_copy(options.memory_bytes, block_bytes, options.total_bytes));
    sockets.push_back(measure_sockets(kSockets, options.memory_bytes, options.total_bytes));
    for (size_t i = 0; i < rounds.size(); ++i) {
      const Measured measured = measure_transfers(options, options.transports[i], block_bytes);
      rounds[i].gb_per_s.push_back(measured.gb_per_s);
      rounds[i].share_of_copy.push_back(measured.gb_per_s / copies.back());
      rounds[i].share_of_socket.push_back(measured.gb_per_s / sockets.back());
      rounds[i].block_us.insert(rounds[i].block_us.end(), measured.block_us.begin(), measured.block_us.end());
    }
  }
  KvBenchRow row{block_bytes, percentile(copies, 0.5), percentile(sockets, 0.5), {}};
  for (size_t i = 0; i < rounds.size(); ++i) {
    row.cells.push_back({options.transports[i], percentile(rounds[i].gb_per_s, 0.5),
                         percentile(rounds[i].share_of_copy, 0.5), percentile(rounds[i].share_of_socket, 0.5),
                         percentile(rounds[i].block_us, 0.5), percentile(rounds[i].block_us, 0.99)});
  }
  return row;
}

}  // namespace

std::vector<KvBenchRow> run_kv_bench(const KvBenchOptions& options) {
  std::vector<KvBenchRow> rows;
  for (const int64_t block_bytes : options.block_bytes) rows.push_back(measure_row(options, block_bytes));
  return rows;
}

std::string kv_report_as_text(const KvBenchOptions& options, const std::vector<KvBenchRow>& rows) {
  std::string text = fmt::format(
      "KV between two processes of this machine: medians of {} rounds; shares are of the same round.\n"
      "memcpy copies blocks of the same size between shuffled places; sockets are {} plain TCP streams.\n\n"
      "{:>9}  {:<8} {:>8} {:>10} {:>11} {:>12} {:>8}\n",
      options.num_rounds, kSockets, "block", "", "GB/s", "of memcpy", "of sockets", "us a block", "p99");
  for (const KvBenchRow& row : rows) {
    const std::string size = fmt::format("{} KiB", row.block_bytes >> 10);
    text += fmt::format("{:>9}  {:<8} {:>8.2f}\n", size, "memcpy", row.copy_gb_per_s);
    text += fmt::format("{:>9}  {:<8} {:>8.2f}\n", "", "sockets", row.socket_gb_per_s);
    for (const KvBenchCell& cell : row.cells) {
      text += fmt::format("{:>9}  {:<8} {:>8.2f} {:>9.0f}% {:>10.0f}% {:>12.0f} {:>8.0f}\n", "",
                          comm::transport_option(cell.transport), cell.gb_per_s, 100 * cell.share_of_copy,
                          100 * cell.share_of_socket, cell.block_us, cell.block_p99_us);
    }
  }
  return text;
}

std::string kv_report_as_json(const KvBenchOptions& options, const std::vector<KvBenchRow>& rows) {
  nlohmann::json list = nlohmann::json::array();
  for (const KvBenchRow& row : rows) {
    nlohmann::json cells = nlohmann::json::object();
    for (const KvBenchCell& cell : row.cells) {
      cells[comm::transport_option(cell.transport)] = {{"gb_per_s", cell.gb_per_s},
                                                       {"share_of_memcpy", cell.share_of_copy},
                                                       {"share_of_sockets", cell.share_of_socket},
                                                       {"block_us", cell.block_us},
                                                       {"block_p99_us", cell.block_p99_us}};
    }
    list.push_back({{"block_bytes", row.block_bytes},
                    {"memcpy_gb_per_s", row.copy_gb_per_s},
                    {"sockets_gb_per_s", row.socket_gb_per_s},
                    {"transports", std::move(cells)}});
  }
  return nlohmann::json{{"num_rounds", options.num_rounds}, {"blocks", std::move(list)}}.dump(2);
}

}  // namespace tandem::bench
