// How fast KV moves between two processes of this machine, beside memcpy and a raw socket. Not a test.
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <span>
#include <thread>
#include <vector>

#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/kernels/ops.h"
#include "src/model/kv_cache.h"
#include "src/transfer/agent.h"

namespace tandem::transfer {
namespace {

constexpr int64_t kTotalBytes = int64_t{1} << 30;  // per throughput measurement
constexpr int64_t kCacheBytes = int64_t{64} << 20;
constexpr int kLatencyRounds = 200;

double seconds_since(int64_t start_us) { return static_cast<double>(SteadyClock().now_us() - start_us) * 1e-6; }

struct Shape {
  const char* name;
  int64_t layers;
  int64_t bytes_per_token;
};

model::KvLayout make_layout(const Shape& shape) {
  model::KvLayout layout;
  layout.kind = model::KvKind::kMla;
  layout.num_layers = shape.layers;
  layout.block_size = 16;
  layout.bytes_per_token = shape.bytes_per_token;
  layout.latent_dim = shape.bytes_per_token / 2;
  return layout;
}

// One side: a cache of kCacheBytes and an agent that is asked for Done events until there is one.
class Side {
 public:
  Side(const Shape& shape, bool shared_memory, bool checksum)
      : layout(make_layout(shape)),
        num_blocks(kCacheBytes / layout.total_block_bytes()),
        ops_(kernels::make_ops("ref", 1).value()),
        cache_(*ops_, layout, num_blocks) {
    std::memset(cache_.base(), 1, static_cast<size_t>(cache_.bytes()));
    CHECK_EQ(pipe(news_), 0);
    AgentOptions options;
    options.engine_id = "bench";
    options.model_fingerprint = "bench";
    options.shared_memory = shared_memory;
    options.checksum = checksum;
    agent = make_ucx_agent(cache_, options, [this] { CHECK_EQ(write(news_[1], "x", 1), 1); }).value();
  }
  void wait_done() {
    while (true) {
      const std::vector<Done> done = agent->take_done();
      if (!done.empty()) {
        if (!done[0].status.ok()) fail_check(__FILE__, __LINE__, done[0].status.error().message);
        return;
      }
      char ignored = 0;
      CHECK_EQ(read(news_[0], &ignored, 1), 1);
    }
  }
  BlockSpan span(int64_t blocks) const {
    BlockSpan span{0, {}, blocks * layout.block_size};
    for (int64_t i = 0; i < blocks; ++i) span.blocks.emplace_back(static_cast<int32_t>(i));
    return span;
  }

  const model::KvLayout layout;
  const int64_t num_blocks;
  std::unique_ptr<Agent> agent;

 private:
  std::unique_ptr<kernels::Ops> ops_;
  model::KvCache cache_;
  int news_[2] = {-1, -1};
};

void read_all(int fd, void* data, size_t size) { CHECK_EQ(read(fd, data, size), static_cast<ssize_t>(size)); }
void write_all(int fd, const void* data, size_t size) { CHECK_EQ(write(fd, data, size), static_cast<ssize_t>(size)); }

// The prefill side, in its own process: publishes what it is asked for and reports the handle.
[[noreturn]] void serve(const Shape& shape, bool shared_memory, bool checksum, int in, int out) {
  {
    Side side(shape, shared_memory, checksum);
    const int64_t port = side.agent->port();
    write_all(out, &port, sizeof port);
    int64_t blocks = 0;
    for (uint64_t id = 1; read(in, &blocks, sizeof blocks) == sizeof blocks; ++id) {
      const std::string handle = side.agent->publish(TransferId(id), side.span(blocks));
      char text[128] = {};
      std::copy(handle.begin(), handle.end(), text);
      write_all(out, text, sizeof text);
      side.wait_done();
    }
  }
  _exit(0);
}

void measure(const Shape& shape, bool shared_memory, bool checksum) {
  int in[2];
  int out[2];
  CHECK_EQ(pipe(in), 0);
  CHECK_EQ(pipe(out), 0);
  const pid_t child = fork();
  if (child == 0) {
    close(in[1]);
    serve(shape, shared_memory, checksum, in[0], out[1]);
  }
  close(in[0]);
  {
    Side side(shape, shared_memory, checksum);
    KvTransferParams remote;
    remote.remote_host = "127.0.0.1";
    read_all(out[0], &remote.remote_port, sizeof remote.remote_port);
    uint64_t id = 1;
    const auto pull = [&](int64_t blocks) {
      char text[128];
      write_all(in[1], &blocks, sizeof blocks);
      read_all(out[0], text, sizeof text);
      remote.remote_request_id = text;
      const int64_t start_us = SteadyClock().now_us();
      side.agent->pull(TransferId(id++), remote, side.span(blocks), 0);
      side.wait_done();
      return seconds_since(start_us);
    };
    pull(1);
    pull(side.num_blocks);
    double seconds = 0;
    int64_t bytes = 0;
    while (bytes < kTotalBytes) {
      seconds += pull(side.num_blocks);
      bytes += side.num_blocks * side.layout.total_block_bytes();
    }
    std::vector<double> latency;
    for (int i = 0; i < kLatencyRounds; ++i) latency.push_back(pull(1) * 1e6);
    std::sort(latency.begin(), latency.end());
    std::printf(
        "%-22s %-4s checksum %-3s  %5.2f GB/s   one block (%lld KiB in all layers): %4.0f us median, %4.0f us p99\n",
        shape.name, shared_memory ? "shm" : "tcp", checksum ? "on" : "off", static_cast<double>(bytes) / seconds * 1e-9,
        static_cast<long long>(side.layout.total_block_bytes() >> 10), latency[latency.size() / 2],
        latency[latency.size() * 99 / 100]);
    std::fflush(stdout);
  }
  close(in[1]);
  close(out[0]);
  close(out[1]);
  waitpid(child, nullptr, 0);
}

void measure_memcpy() {
  std::vector<char> from(static_cast<size_t>(kCacheBytes), 1);
  std::vector<char> to(static_cast<size_t>(kCacheBytes), 2);
  const int64_t start_us = SteadyClock().now_us();
  for (int64_t bytes = 0; bytes < kTotalBytes; bytes += kCacheBytes) std::memcpy(to.data(), from.data(), to.size());
  std::printf("memcpy                                    %5.2f GB/s (%d)\n",
              static_cast<double>(kTotalBytes) / seconds_since(start_us) * 1e-9, to[5]);
}

void measure_socket() {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  CHECK_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), length), 0);
  CHECK_EQ(listen(listener, 1), 0);
  CHECK_EQ(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length), 0);
  std::vector<char> buffer(static_cast<size_t>(kCacheBytes), 1);
  const pid_t child = fork();
  if (child == 0) {
    const int out = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_EQ(connect(out, reinterpret_cast<sockaddr*>(&address), length), 0);
    for (int64_t sent = 0; sent < kTotalBytes;) {
      const ssize_t count = send(out, buffer.data() + sent % (kCacheBytes / 2), 1 << 20, 0);
      CHECK_GT(count, 0);
      sent += count;
    }
    _exit(0);
  }
  const int in = accept(listener, nullptr, nullptr);
  const int64_t start_us = SteadyClock().now_us();
  int64_t received = 0;
  while (received < kTotalBytes) {
    const ssize_t count = recv(in, buffer.data() + received % (kCacheBytes / 2), 1 << 20, 0);
    if (count <= 0) break;
    received += count;
  }
  std::printf("raw socket, one stream                    %5.2f GB/s\n",
              static_cast<double>(received) / seconds_since(start_us) * 1e-9);
  std::fflush(stdout);
  close(in);
  close(listener);
  waitpid(child, nullptr, 0);
}

}  // namespace
}  // namespace tandem::transfer

int main() {
  using namespace tandem;
  init_log(LogLevel::kError, "bench");
  transfer::measure_memcpy();
  transfer::measure_socket();
  const transfer::Shape shapes[] = {
      {"6 x 16 x 160 B", 6, 160}, {"61 x 16 x 1152 B", 61, 1152}, {"4 x 16 x 8192 B", 4, 8192}};
  for (const transfer::Shape& shape : shapes) {
    for (const bool shared_memory : {true, false}) {
      for (const bool checksum : {true, false}) transfer::measure(shape, shared_memory, checksum);
    }
  }
  transfer::measure_memcpy();
  return 0;
}
