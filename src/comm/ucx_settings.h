// The UCX settings of Tandem, made in the program: the environment cannot change them.
#pragma once

#include <ucp/api/ucp.h>

#include <string>

#include "src/base/result.h"

namespace tandem::comm {

// `device` is the network device for TCP ("lo", "eth0").
Result<ucp_context_h> make_ucx_context(const std::string& device, bool shared_memory);
// "posix/memory", "tcp/lo": what carries the messages of a connected endpoint.
std::string describe_transport(ucp_ep_h endpoint);

}  // namespace tandem::comm
