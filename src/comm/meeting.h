// How two messengers meet: a plain TCP connection on which each sends its UCX worker address, the one that connected
// first. The socket then stays open and silent; the kernel closes it when a process dies, which tells the other side
// within milliseconds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/comm/address.h"

namespace tandem::comm {

inline constexpr int64_t kMaxWorkerAddressBytes = 8 * 1024;

// Non-blocking, close-on-exec. The error says "cannot listen on … for `purpose`: …; choose another `option`".
Result<int> open_listener(const SocketAddress& address, const char* purpose, const char* option);
// Starts a connection; the descriptor is writable when it stands or has failed.
Result<int> start_connect(const SocketAddress& address);
// A waiting connection of `listener`, or -1 if there is none.
int accept_connection(int listener, SocketAddress* peer);

// One side of the exchange over a connected, non-blocking socket.
class Meeting {
 public:
  explicit Meeting(int socket);  // takes the socket
  ~Meeting();
  Meeting(const Meeting&) = delete;
  Meeting& operator=(const Meeting&) = delete;

  int socket() const { return socket_; }
  bool wants_write() const { return sent_ < out_.size(); }
  bool has_spoken() const { return !out_.empty(); }
  bool has_heard() const { return complete_; }
  const std::vector<std::byte>& peer_address() const { return peer_address_; }

  // What the peer shall get: 1 … kMaxWorkerAddressBytes bytes. advance() sends it.
  void say(std::span<const std::byte> address);
  // Sends and reads what is possible now. An error means that the peer is gone or speaks something else; after
  // has_heard(), any byte or end of file is such an error.
  Status advance();

 private:
  Status write_some();
  Status read_some();
  Status check_prefix();

  int socket_;
  std::vector<std::byte> out_;
  size_t sent_ = 0;
  std::vector<std::byte> in_;
  size_t received_ = 0;
  bool complete_ = false;
  std::vector<std::byte> peer_address_;
};

}  // namespace tandem::comm
