#include "src/comm/transport.h"

namespace tandem::comm {
namespace {

constexpr Transport kAll[] = {Transport::kAuto, Transport::kSharedMemory, Transport::kTcp, Transport::kUcx,
                              Transport::kUcxTcp};

}  // namespace

const char* transport_option(Transport transport) {
  switch (transport) {
    case Transport::kAuto:
      return "auto";
    case Transport::kSharedMemory:
      return "shm";
    case Transport::kTcp:
      return "tcp";
    case Transport::kUcx:
      return "ucx";
    case Transport::kUcxTcp:
      return "ucx_tcp";
  }
  return "?";
}

std::optional<Transport> parse_transport(std::string_view text) {
  for (const Transport transport : kAll) {
    if (text == transport_option(transport)) return transport;
  }
  return std::nullopt;
}

}  // namespace tandem::comm
