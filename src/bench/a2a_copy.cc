#include "src/bench/a2a_copy.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>

#include "src/base/check.h"
#include "src/comm/address.h"
#include "src/comm/meeting.h"

namespace tandem::bench {
namespace {

constexpr int64_t kLine = 64;
constexpr int kPollMs = 60'000;  // a peer that sends nothing for so long is dead

class MemoryCopy final : public PlainCopy {
 public:
  MemoryCopy(group::Fabric& fabric, int64_t offset) : fabric_(fabric), offset_(offset) {}

  Status exchange(std::span<const std::byte> data, std::span<const int64_t> bytes_to,
                  std::span<const int64_t> /*bytes_from*/) override {
    const int32_t rank = fabric_.rank().value;
    const int64_t room = std::ssize(fabric_.window()) - offset_;
    size_t from = 0;
    for (int32_t i = 1; i < fabric_.size(); ++i) {
      const int32_t to = (rank + i) % fabric_.size();
      const int64_t bytes = bytes_to[static_cast<size_t>(to)];
      CHECK_LE(bytes, room);
      const int64_t place = room / (fabric_.size() - 1) * (rank < to ? rank : rank - 1) / kLine * kLine;
      std::memcpy(fabric_.direct(group::RankId(to)) + offset_ + std::min(place, room - bytes), data.data() + from,
                  static_cast<size_t>(bytes));
      from += static_cast<size_t>(bytes);
    }
    return {};
  }

 private:
  group::Fabric& fabric_;
  const int64_t offset_;
};

class SocketCopy final : public PlainCopy {
 public:
  explicit SocketCopy(std::vector<int> sockets) : sockets_(std::move(sockets)) {}

  Status exchange(std::span<const std::byte> data, std::span<const int64_t> bytes_to,
                  std::span<const int64_t> bytes_from) override {
    std::vector<Peer> peers;
    const int64_t incoming = std::accumulate(bytes_from.begin(), bytes_from.end(), int64_t{0});
    if (std::ssize(memory_) < incoming) memory_.resize(static_cast<size_t>(incoming));
    size_t out = 0;
    size_t in = 0;
    for (size_t r = 0; r < sockets_.size(); ++r) {
      if (sockets_[r] < 0) continue;
      const size_t to = static_cast<size_t>(bytes_to[r]);
      const size_t from = static_cast<size_t>(bytes_from[r]);
      peers.push_back({sockets_[r], data.subspan(out, to), std::span(memory_).subspan(in, from)});
      out += to;
      in += from;
    }
    while (true) {
      std::vector<pollfd> waits;
      for (Peer& peer : peers) {
        TANDEM_TRY(move_some(peer));
        const int events = (peer.in.empty() ? 0 : POLLIN) | (peer.out.empty() ? 0 : POLLOUT);
        if (events != 0) waits.push_back({peer.socket, static_cast<short>(events), 0});
      }
      if (waits.empty()) return {};
      if (::poll(waits.data(), waits.size(), kPollMs) <= 0) {
        return make_error(ErrorKind::kUnavailable, "nothing has come through the raw sockets for {} s", kPollMs / 1000);
      }
    }
  }

 private:
  struct Peer {
    int socket;
    std::span<const std::byte> out;
    std::span<std::byte> in;
  };

  static Status move_some(Peer& peer) {
    while (!peer.out.empty()) {
      const ssize_t count = ::send(peer.socket, peer.out.data(), peer.out.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
      if (count < 0 && errno == EAGAIN) break;
      if (count <= 0) return make_error(ErrorKind::kUnavailable, "raw socket: {}", std::strerror(errno));
      peer.out = peer.out.subspan(static_cast<size_t>(count));
    }
    while (!peer.in.empty()) {
      const ssize_t count = ::recv(peer.socket, peer.in.data(), peer.in.size(), MSG_DONTWAIT);
      if (count < 0 && errno == EAGAIN) break;
      if (count <= 0) return make_error(ErrorKind::kUnavailable, "raw socket: closed by the peer");
      peer.in = peer.in.subspan(static_cast<size_t>(count));
    }
    return {};
  }

  const std::vector<int> sockets_;
  std::vector<std::byte> memory_;
};

// Two ends of a TCP connection over loopback.
Result<std::pair<int, int>> connect_pair() {
  TANDEM_ASSIGN(comm::SocketAddress address, comm::look_up_address("127.0.0.1", 0));
  TANDEM_ASSIGN(const int listener, comm::open_listener(address, "the raw sockets of bench a2a", "--over"));
  ::fcntl(listener, F_SETFL, ::fcntl(listener, F_GETFL) & ~O_NONBLOCK);
  comm::SocketAddress bound;
  bound.length = sizeof bound.storage;
  const int first = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const bool is_connected = first >= 0 &&
                            ::getsockname(listener, reinterpret_cast<sockaddr*>(&bound.storage), &bound.length) == 0 &&
                            ::connect(first, bound.get(), bound.length) == 0;
  const int second = is_connected ? ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC) : -1;
  ::close(listener);
  if (second < 0) {
    if (first >= 0) ::close(first);
    return make_error(ErrorKind::kUnavailable, "no TCP connection over 127.0.0.1: {}", std::strerror(errno));
  }
  const int on = 1;
  for (const int socket : {first, second}) CHECK_EQ(::setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), 0);
  return std::pair(first, second);
}

}  // namespace

std::unique_ptr<PlainCopy> copy_by_memory(group::Fabric& fabric, int64_t offset) {
  return std::make_unique<MemoryCopy>(fabric, offset);
}

std::unique_ptr<PlainCopy> copy_by_sockets(std::vector<int> sockets) {
  return std::make_unique<SocketCopy>(std::move(sockets));
}

Result<SocketMesh> SocketMesh::connect(int64_t ranks) {
  SocketMesh mesh;
  const size_t size = static_cast<size_t>(ranks);
  mesh.sockets_.assign(size, std::vector<int>(size, -1));
  for (size_t a = 0; a < size; ++a) {
    for (size_t b = a + 1; b < size; ++b) {
      TANDEM_ASSIGN(const auto ends, connect_pair());
      mesh.sockets_[a][b] = ends.first;
      mesh.sockets_[b][a] = ends.second;
    }
  }
  return mesh;
}

SocketMesh::~SocketMesh() {
  for (const std::vector<int>& sockets : sockets_) {
    for (const int socket : sockets) {
      if (socket >= 0) ::close(socket);
    }
  }
}

}  // namespace tandem::bench
