// Which way messages and payloads take between two processes.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace tandem::comm {

enum class Transport : uint8_t {
  kAuto,           // shared memory with peers that can read ours and we theirs, otherwise TCP; each choice is logged
  kSharedMemory,   // the same, but a peer that cannot be reached so is refused
  kTcp,            // several TCP streams, also within a host
  kUcx,            // UCX: its shared memory within a host, its TCP between hosts
  kUcxTcp,         // UCX's TCP everywhere
};

// Whether payloads may be read by other processes, so that they should lie in shareable memory.
inline bool may_share_memory(Transport transport) {
  return transport == Transport::kAuto || transport == Transport::kSharedMemory;
}
const char* transport_option(Transport transport);  // "auto", "shm", "tcp", "ucx", "ucx_tcp"
std::optional<Transport> parse_transport(std::string_view text);

}  // namespace tandem::comm
