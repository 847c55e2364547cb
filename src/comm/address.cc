#include "src/comm/address.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>

#include <cstring>

namespace tandem::comm {
namespace {

// The address bytes without the port; empty for families other than IP.
std::string address_bytes(const sockaddr* address) {
  if (address->sa_family == AF_INET) {
    sockaddr_in v4{};
    std::memcpy(&v4, address, sizeof v4);
    return std::string(reinterpret_cast<const char*>(&v4.sin_addr), sizeof v4.sin_addr);
  }
  if (address->sa_family == AF_INET6) {
    sockaddr_in6 v6{};
    std::memcpy(&v6, address, sizeof v6);
    return std::string(reinterpret_cast<const char*>(&v6.sin6_addr), sizeof v6.sin6_addr);
  }
  return "";
}

bool is_loopback(const sockaddr* address) {
  const std::string bytes = address_bytes(address);
  if (bytes.size() == sizeof(in_addr)) return bytes[0] == 127;
  return bytes.size() == sizeof(in6_addr) && std::memcmp(bytes.data(), &in6addr_loopback, bytes.size()) == 0;
}

Result<SocketAddress> resolve(const std::string& host, int64_t port, int flags) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int code = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (code != 0) return make_error(ErrorKind::kUnavailable, "host '{}': {}", host, gai_strerror(code));
  SocketAddress address;
  address.length = found->ai_addrlen;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  freeaddrinfo(found);
  return address;
}

}  // namespace

int64_t SocketAddress::port() const {
  if (storage.ss_family == AF_INET6) return ntohs(reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_port);
  return ntohs(reinterpret_cast<const sockaddr_in*>(&storage)->sin_port);
}

std::string SocketAddress::to_string() const {
  char text[INET6_ADDRSTRLEN] = "?";
  if (storage.ss_family == AF_INET6) {
    inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_addr, text, sizeof text);
    return fmt::format("[{}]:{}", text, port());
  }
  inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(&storage)->sin_addr, text, sizeof text);
  return fmt::format("{}:{}", text, port());
}

std::optional<SocketAddress> parse_address(const std::string& host, int64_t port) {
  Result<SocketAddress> address = resolve(host == "localhost" ? "127.0.0.1" : host, port, AI_NUMERICHOST);
  if (!address.ok()) return std::nullopt;
  return std::move(address).value();
}

Result<SocketAddress> look_up_address(const std::string& host, int64_t port) { return resolve(host, port, 0); }

Result<std::string> find_device(const SocketAddress& address) {
  const std::string wanted = address_bytes(address.get());
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return make_error(ErrorKind::kInternal, "cannot list the network devices");
  std::string device;
  std::string loopback;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr) continue;
    if (is_loopback(entry->ifa_addr)) loopback = entry->ifa_name;
    if (device.empty() && address_bytes(entry->ifa_addr) == wanted) device = entry->ifa_name;
  }
  freeifaddrs(list);
  // All of 127.0.0.0/8 is this machine, but only 127.0.0.1 is listed.
  if (device.empty() && is_loopback(address.get())) device = loopback;
  if (device.empty()) {
    return invalid_argument("kv_ip", "{} is not an address of this machine", address.to_string());
  }
  return device;
}

}  // namespace tandem::comm
