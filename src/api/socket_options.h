// Settings of every TCP connection of ours, client side and server side.
#pragma once

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

namespace tandem::api {

// Without these a peer whose machine vanished would be noticed only after hours.
inline constexpr int kKeepAliveIdleSeconds = 15;
inline constexpr int kKeepAliveIntervalSeconds = 5;
inline constexpr int kKeepAliveProbes = 3;
inline constexpr int kUnacknowledgedMilliseconds = 30'000;

// Best effort: a kernel that refuses one of them still has a working connection.
inline void tune_tcp_socket(int fd) {
  const auto set = [fd](int level, int name, int value) {
    (void)::setsockopt(fd, level, name, &value, static_cast<socklen_t>(sizeof value));
  };
  set(IPPROTO_TCP, TCP_NODELAY, 1);  // a token must not wait for the acknowledgement of the one before
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, kKeepAliveIdleSeconds);
  set(IPPROTO_TCP, TCP_KEEPINTVL, kKeepAliveIntervalSeconds);
  set(IPPROTO_TCP, TCP_KEEPCNT, kKeepAliveProbes);
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, kUnacknowledgedMilliseconds);
}

}  // namespace tandem::api
