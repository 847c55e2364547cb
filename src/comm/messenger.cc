#include "src/comm/messenger.h"

#include <vector>

namespace tandem::comm {

int64_t BorrowedPayload::bytes() const {
  int64_t total = 0;
  for (const ByteSpan piece : pieces_) total += std::ssize(piece);
  return total;
}

void MessageHandler::on_borrowed_message(ConnectionId connection, std::span<const std::byte> message,
                                         const BorrowedPayload& payload) {
  std::vector<std::byte> copy;
  copy.reserve(static_cast<size_t>(payload.bytes()));
  for (const ByteSpan piece : payload.pieces()) copy.insert(copy.end(), piece.begin(), piece.end());
  if (payload.is_valid()) on_message(connection, message, copy);
}

SendResult Messenger::send_pieces(ConnectionId, std::span<const std::byte>, std::span<const ByteSpan>, uint64_t) {
  fail_check(__FILE__, __LINE__, "this messenger takes no pieces");
}

void Messenger::revoke(ConnectionId, uint64_t) { fail_check(__FILE__, __LINE__, "this messenger takes no pieces"); }

Result<std::unique_ptr<Messenger>> make_messenger(const MessengerOptions& options, MessageHandler& handler) {
  const bool by_ucx = options.transport == Transport::kUcx || options.transport == Transport::kUcxTcp;
  return by_ucx ? make_ucx_messenger(options, handler) : make_stream_messenger(options, handler);
}

}  // namespace tandem::comm
