#include "src/comm/meeting.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace tandem::comm {
namespace {

constexpr uint32_t kMagic = 0x504e4454;  // "TDNP"
constexpr uint32_t kVersion = 1;
constexpr int kBacklog = 128;
constexpr int kKeepIdleS = 2;  // a host that vanishes without a word is noticed …
constexpr int kKeepIntervalS = 1;
constexpr int kKeepCount = 3;  // … after 2 + 3 * 1 seconds

struct Prefix {
  uint32_t magic = 0;
  uint32_t version = 0;
  uint32_t length = 0;  // of the worker address that follows
};

void set_option(int socket, int level, int name, int value) { setsockopt(socket, level, name, &value, sizeof value); }

void tune(int socket) {
  set_option(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(socket, IPPROTO_TCP, TCP_KEEPIDLE, kKeepIdleS);
  set_option(socket, IPPROTO_TCP, TCP_KEEPINTVL, kKeepIntervalS);
  set_option(socket, IPPROTO_TCP, TCP_KEEPCNT, kKeepCount);
}

Error make_socket_error(const char* what) {
  return make_error(ErrorKind::kUnavailable, "{}: {}", what, std::strerror(errno));
}

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

}  // namespace

Result<int> open_listener(const SocketAddress& address, const char* purpose, const char* option) {
  const int fd = socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return make_socket_error("socket");
  // A restarted worker may take its port while connections of its predecessor are in TIME_WAIT.
  set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
  if (bind(fd, address.get(), address.length) != 0 || listen(fd, kBacklog) != 0) {
    const Error error = invalid_argument(option, "cannot listen on {} for {}: {}; choose another {}",
                                         address.to_string(), purpose, std::strerror(errno), option);
    close(fd);
    return error;
  }
  return fd;
}

Result<int> start_connect(const SocketAddress& address) {
  const int fd = socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return make_socket_error("socket");
  tune(fd);
  if (connect(fd, address.get(), address.length) != 0 && errno != EINPROGRESS) {
    const Error error = make_socket_error("connect");
    close(fd);
    return error;
  }
  return fd;
}

int accept_connection(int listener, SocketAddress* peer) {
  peer->length = sizeof peer->storage;
  const int fd =
      accept4(listener, reinterpret_cast<sockaddr*>(&peer->storage), &peer->length, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd >= 0) tune(fd);
  return fd;
}

Meeting::Meeting(int socket) : socket_(socket) {
  in_.resize(sizeof(Prefix) + static_cast<size_t>(kMaxWorkerAddressBytes));
}

Meeting::~Meeting() { close(socket_); }

void Meeting::say(std::span<const std::byte> address) {
  CHECK(!has_spoken());
  CHECK(!address.empty());
  CHECK_LE(std::ssize(address), kMaxWorkerAddressBytes);
  const Prefix prefix{kMagic, kVersion, static_cast<uint32_t>(address.size())};
  out_.resize(sizeof prefix + address.size());
  std::memcpy(out_.data(), &prefix, sizeof prefix);
  std::memcpy(out_.data() + sizeof prefix, address.data(), address.size());
}

Status Meeting::advance() {
  TANDEM_TRY(write_some());
  return read_some();
}

Status Meeting::write_some() {
  while (sent_ < out_.size()) {
    const ssize_t count = ::send(socket_, out_.data() + sent_, out_.size() - sent_, MSG_NOSIGNAL);
    if (count < 0) {
      if (would_block() || errno == ENOTCONN) return {};
      return make_socket_error("send");
    }
    sent_ += static_cast<size_t>(count);
  }
  return {};
}

Status Meeting::read_some() {
  while (true) {
    if (received_ == in_.size()) return make_error(ErrorKind::kUnavailable, "unexpected bytes");
    const ssize_t count = recv(socket_, in_.data() + received_, in_.size() - received_, 0);
    if (count < 0) {
      if (would_block() || errno == ENOTCONN) return {};
      return make_socket_error("receive");
    }
    if (count == 0) return make_error(ErrorKind::kUnavailable, "closed by the peer");
    received_ += static_cast<size_t>(count);
    TANDEM_TRY(check_prefix());
  }
}

Status Meeting::check_prefix() {
  Prefix prefix;
  if (received_ < sizeof prefix) return {};
  std::memcpy(&prefix, in_.data(), sizeof prefix);
  if (prefix.magic != kMagic || prefix.version != kVersion) {
    return make_error(ErrorKind::kUnavailable,
                      "not a KV transfer port of this version ({:#x}, {} instead of {:#x}, {})", prefix.magic,
                      prefix.version, kMagic, kVersion);
  }
  if (prefix.length == 0 || prefix.length > kMaxWorkerAddressBytes) {
    return make_error(ErrorKind::kUnavailable, "a worker address of {} bytes", prefix.length);
  }
  const size_t whole = sizeof prefix + prefix.length;
  if (received_ > whole) return make_error(ErrorKind::kUnavailable, "unexpected bytes");
  if (received_ == whole && !complete_) {
    complete_ = true;
    peer_address_.assign(in_.begin() + sizeof prefix, in_.begin() + static_cast<ptrdiff_t>(whole));
  }
  return {};
}

}  // namespace tandem::comm
