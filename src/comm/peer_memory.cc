#include "src/comm/peer_memory.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

namespace tandem::comm {
namespace {

// Opens what is offered, and nothing else that may have the same number in another container.
Result<SharedRegion> open_offer(const SharedOffer& offer) {
  const std::string path = fmt::format("/proc/{}/fd/{}", offer.pid, offer.fd);
  struct stat facts {};
  if (::stat(path.c_str(), &facts) != 0) {
    return make_error(ErrorKind::kUnavailable, "{}: {}", path, std::strerror(errno));
  }
  if (facts.st_dev != offer.device || facts.st_ino != offer.inode) {
    return make_error(ErrorKind::kUnavailable, "{} is something else: another container", path);
  }
  return SharedRegion::open({offer.pid, offer.fd, offer.bytes}, SharedRegion::Access::kRead);
}

}  // namespace

std::string read_boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id;
}

SharedOffer make_offer(int fd, int64_t bytes) {
  SharedOffer offer;
  struct stat facts {};
  if (fd < 0 || ::fstat(fd, &facts) != 0) return offer;
  CHECK_LE(bytes, static_cast<int64_t>(facts.st_size));
  return {::getpid(), fd, facts.st_size, facts.st_dev, facts.st_ino};
}

Result<PeerMemory> PeerMemory::open(const Greeting& greeting, const std::string& boot_id) {
  if (boot_id.empty() || text_of(greeting.boot_id) != boot_id) {
    return make_error(ErrorKind::kUnavailable, "another host");
  }
  if (greeting.memory.fd < 0 || greeting.tickets.fd < 0) {
    return make_error(ErrorKind::kUnavailable, "the peer offers no shared memory");
  }
  if (greeting.tickets.bytes != kTicketBytes) {
    return make_error(ErrorKind::kUnavailable, "tickets of {} bytes instead of {}", greeting.tickets.bytes,
                      kTicketBytes);
  }
  PeerMemory peer;
  TANDEM_ASSIGN(peer.memory_, open_offer(greeting.memory));
  TANDEM_ASSIGN(peer.tickets_, open_offer(greeting.tickets));
  // An optimisation: refusal is harmless.
  ::madvise(peer.memory_.data(), static_cast<size_t>(peer.memory_.bytes()), MADV_HUGEPAGE);
  return peer;
}

Status PeerMemory::find(std::span<const BorrowPiece> pieces, std::vector<ByteSpan>& out) const {
  const uint64_t limit = static_cast<uint64_t>(memory_.bytes());
  uint64_t total = 0;
  out.clear();
  for (const BorrowPiece& piece : pieces) {
    if (piece.bytes > static_cast<uint64_t>(kMaxStreamPayloadBytes) || piece.offset > limit ||
        piece.bytes > limit - piece.offset) {
      return make_error(ErrorKind::kUnavailable, "a payload of {} bytes at {} of {} shared bytes", piece.bytes,
                        piece.offset, limit);
    }
    total += piece.bytes;
    out.push_back(memory_.span().subspan(piece.offset, piece.bytes));
  }
  if (total > static_cast<uint64_t>(kMaxStreamPayloadBytes)) {
    return make_error(ErrorKind::kUnavailable, "a borrowed payload of {} bytes; at most {} are taken", total,
                      kMaxStreamPayloadBytes);
  }
  return {};
}

}  // namespace tandem::comm
