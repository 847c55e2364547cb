// What this machine can do at most, for KV to be measured against. Both in 1e9 bytes per second.
#pragma once

#include <cstdint>

namespace tandem::bench {

// One thread copies blocks of `block_bytes` from and to shuffled places of two memories of `memory_bytes`.
double measure_copy(int64_t memory_bytes, int64_t block_bytes, int64_t total_bytes);
// Another process sends over `num_sockets` TCP streams of the loopback device, with a blocking thread for each on both
// sides. Uses fork(): the calling process must have one thread only.
double measure_sockets(int num_sockets, int64_t memory_bytes, int64_t total_bytes);

}  // namespace tandem::bench
