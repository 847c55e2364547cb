// How many files and sockets this process may have open at once (RLIMIT_NOFILE).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace tandem {

// Raises the soft limit to the hard one, for this process and those that it starts later; returns the limit that holds
// then. Shells and service managers often give a soft limit of 1024 under a hard one of half a million, for the sake of
// select(), which nothing here calls.
int64_t raise_descriptor_limit();

// What to tell the operator if `limit` descriptors are fewer than `needed`, which `reason` explains; else "".
std::string describe_descriptor_shortage(int64_t limit, int64_t needed, std::string_view reason);

}  // namespace tandem
