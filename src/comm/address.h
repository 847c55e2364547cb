// Socket addresses: of a listener on this machine, and of a peer.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <optional>
#include <string>

#include "src/base/result.h"

namespace tandem::comm {

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  int64_t port() const;
  std::string to_string() const;  // "10.0.0.1:9000", "[::1]:9000"
};

// The address of a numeric host or "localhost"; nothing for a name that has to be looked up.
std::optional<SocketAddress> parse_address(const std::string& host, int64_t port);
// Asks the system's resolver, which may take seconds.
Result<SocketAddress> look_up_address(const std::string& host, int64_t port);
// The name of the network device that has this address ("lo", "eth0").
Result<std::string> find_device(const SocketAddress& address);

}  // namespace tandem::comm
