#include "src/bench/kv_limits.h"

#include <netinet/in.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "src/base/check.h"
#include "src/base/clock.h"

namespace tandem::bench {
namespace {

constexpr int64_t kCallBytes = 256 * 1024;  // of one send or receive

std::vector<int64_t> shuffled_offsets(int64_t memory_bytes, int64_t block_bytes, uint64_t seed) {
  std::vector<int64_t> offsets;
  for (int64_t offset = 0; offset + block_bytes <= memory_bytes; offset += block_bytes) offsets.push_back(offset);
  std::mt19937_64 random(seed);
  std::shuffle(offsets.begin(), offsets.end(), random);
  return offsets;
}

double rate(int64_t bytes, int64_t us) { return static_cast<double>(bytes) / static_cast<double>(us) * 1e-3; }

void send_bytes(const sockaddr_in& address, int64_t memory_bytes, int64_t total_bytes) {
  const std::vector<char> memory(static_cast<size_t>(memory_bytes), 1);
  const int out = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  CHECK_EQ(connect(out, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  char start = 0;
  CHECK_EQ(recv(out, &start, 1, 0), 1);
  for (int64_t sent = 0; sent < total_bytes;) {
    const int64_t offset = sent % (memory_bytes - kCallBytes);
    const ssize_t count =
        send(out, memory.data() + offset, static_cast<size_t>(std::min(kCallBytes, total_bytes - sent)), MSG_NOSIGNAL);
    CHECK_GT(count, 0);
    sent += count;
  }
  close(out);
}

void receive_bytes(int in, std::vector<char>& memory, int64_t total_bytes) {
  const int64_t room = std::ssize(memory) - kCallBytes;
  for (int64_t received = 0; received < total_bytes;) {
    const ssize_t count = recv(in, memory.data() + received % room, static_cast<size_t>(kCallBytes), 0);
    CHECK_GT(count, 0);
    received += count;
  }
}

}  // namespace

double measure_copy(int64_t memory_bytes, int64_t block_bytes, int64_t total_bytes) {
  const std::vector<char> from(static_cast<size_t>(memory_bytes), 1);
  std::vector<char> to(static_cast<size_t>(memory_bytes), 2);
  const std::vector<int64_t> sources = shuffled_offsets(memory_bytes, block_bytes, 1);
  const std::vector<int64_t> targets = shuffled_offsets(memory_bytes, block_bytes, 2);
  const SteadyClock clock;
  const int64_t start_us = clock.now_us();
  int64_t copied = 0;
  while (copied < total_bytes) {
    for (size_t i = 0; i < sources.size(); ++i) {
      std::memcpy(to.data() + targets[i], from.data() + sources[i], static_cast<size_t>(block_bytes));
    }
    copied += std::ssize(sources) * block_bytes;
  }
  return rate(copied, clock.now_us() - start_us);
}

double measure_sockets(int num_sockets, int64_t memory_bytes, int64_t total_bytes) {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  CHECK_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), length), 0);
  CHECK_EQ(listen(listener, num_sockets), 0);
  CHECK_EQ(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length), 0);
  const int64_t each_memory = memory_bytes / num_sockets;
  const int64_t each_total = total_bytes / num_sockets;
  const pid_t child = fork();
  CHECK_GE(child, 0);
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    std::vector<std::thread> threads;
    for (int i = 0; i < num_sockets; ++i) threads.emplace_back(send_bytes, address, each_memory, each_total);
    for (std::thread& thread : threads) thread.join();
    _exit(0);
  }
  std::vector<int> sockets;
  std::vector<std::vector<char>> memories;
  for (int i = 0; i < num_sockets; ++i) {
    sockets.push_back(accept(listener, nullptr, nullptr));
    CHECK_GE(sockets.back(), 0);
    memories.emplace_back(static_cast<size_t>(each_memory), 2);
  }
  const SteadyClock clock;
  const int64_t start_us = clock.now_us();
  for (const int in : sockets) CHECK_EQ(send(in, "s", 1, MSG_NOSIGNAL), 1);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < sockets.size(); ++i) {
    threads.emplace_back([&, i] { receive_bytes(sockets[i], memories[i], each_total); });
  }
  for (std::thread& thread : threads) thread.join();
  const int64_t us = clock.now_us() - start_us;
  for (const int in : sockets) close(in);
  close(listener);
  waitpid(child, nullptr, 0);
  return rate(each_total * num_sockets, us);
}

}  // namespace tandem::bench
