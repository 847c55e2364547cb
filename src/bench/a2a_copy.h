// What `tandem bench a2a` compares itself with: the same bytes to the same peers, plainly.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "src/base/result.h"
#include "src/group/fabric.h"

namespace tandem::bench {

class PlainCopy {
 public:
  virtual ~PlainCopy() = default;
  // Sends bytes_to[r] bytes of `data` to each rank r, one after the other from its begin on, and takes bytes_from[r].
  // All ranks call it at the same time.
  virtual Status exchange(std::span<const std::byte> data, std::span<const int64_t> bytes_to,
                          std::span<const int64_t> bytes_from) = 0;
};

// A memcpy for each peer, into its window from `offset` on, each sender into a part of its own. Nothing is waited for.
std::unique_ptr<PlainCopy> copy_by_memory(group::Fabric& fabric, int64_t offset);

// A TCP connection between each two of `ranks` ranks, over loopback: [rank][peer], -1 for itself. They close with the
// object; those who fork have them all.
class SocketMesh {
 public:
  static Result<SocketMesh> connect(int64_t ranks);
  SocketMesh() = default;
  SocketMesh(SocketMesh&&) = default;
  SocketMesh& operator=(SocketMesh&&) = default;
  ~SocketMesh();

  const std::vector<int>& sockets_of(size_t rank) const { return sockets_[rank]; }

 private:
  std::vector<std::vector<int>> sockets_;
};

// Over the raw sockets of one rank, all at once, as fast as one thread can; into memory that it writes anew each time.
std::unique_ptr<PlainCopy> copy_by_sockets(std::vector<int> sockets);

}  // namespace tandem::bench
