// Which processes can share memory.
#pragma once

#include <string>

namespace tandem::group {

// Equal in processes that see each other's memory and network alike: same boot of the machine, same user, same
// namespaces of processes and of the network. So two containers of one machine are two nodes.
std::string this_node();

}  // namespace tandem::group
