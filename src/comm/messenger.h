// Messages between processes: small control messages and payloads of up to kMaxPayloadBytes, over named connections.
//
// Two-sided on purpose. A payload is copied out of the sender's buffer into transport memory, and the receiver is
// shown a view of it; where the bytes go is the receiver's decision after it has read the message. No address of the
// receiver's memory is known to the sender, so a late, repeated or stray message can be dropped but can never land.
//
// Threading: every method but wake() belongs to one thread, and the handler is called on it, only from poll().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "src/base/ids.h"
#include "src/base/result.h"

namespace tandem::comm {

// One connection of one messenger; never reused while the process lives.
using ConnectionId = StrongId<struct ConnectionIdTag, uint64_t>;

// A payload and its message fit into one 64 KiB shared-memory segment: no reassembly, no allocation by the transport.
inline constexpr int64_t kMaxPayloadBytes = 63 * 1024;
inline constexpr int64_t kMaxMessageBytes = 16 * 1024;   // a message without payload
inline constexpr int64_t kMaxHeaderBytes = 512;          // a message that has a payload
inline constexpr int64_t kMaxConnections = 256;          // opened and accepted together
inline constexpr int64_t kMaxSendsPerConnection = 4096;  // not yet finished by the transport

class MessageHandler {
 public:
  virtual ~MessageHandler() = default;
  virtual void on_accept(ConnectionId connection) = 0;
  // The views end with the call. `payload` is empty for a message sent without one.
  virtual void on_message(ConnectionId connection, std::span<const std::byte> message,
                          std::span<const std::byte> payload) = 0;
  // The payload sent with `token` is no longer read by the transport. Says nothing about its arrival.
  virtual void on_sent(ConnectionId connection, uint64_t token) = 0;
  // The peer is gone or could not be reached. Follows the last on_sent of the connection; the id is dead.
  // Not called after close().
  virtual void on_closed(ConnectionId connection, const Error& why) = 0;
};

enum class SendResult : uint8_t {
  kSent,     // the payload may be reused now; no on_sent follows
  kPending,  // the payload must stay until on_sent(token)
  kClosed,   // the connection is closing or unknown; nothing was sent, no on_sent follows
};

class Messenger {
 public:
  virtual ~Messenger() = default;

  // The port in use.
  virtual int64_t port() const = 0;
  // Starts connecting; messages may be sent at once and wait. The outcome is a message from the peer, or on_closed.
  virtual Result<ConnectionId> connect(const std::string& host, int64_t port) = 0;
  // Messages of one connection arrive in order.
  virtual SendResult send(ConnectionId connection, std::span<const std::byte> message,
                          std::span<const std::byte> payload = {}, uint64_t token = 0) = 0;
  // Drops the connection at once, with whatever is still queued. on_sent still follows for pending payloads.
  virtual void close(ConnectionId connection) = 0;
  // "posix/memory", "tcp/eth0"; "connecting" before that is known.
  virtual std::string transport_name(ConnectionId connection) const = 0;

  // Handles what has arrived, then sleeps in the kernel until something arrives, wake() is called or `timeout_us` is
  // over.
  virtual void poll(int64_t timeout_us) = 0;
  // Ends the current or the next sleep of poll(). From any thread.
  virtual void wake() = 0;
};

struct MessengerOptions {
  std::string listen_host = "127.0.0.1";  // an address of this machine that peers can reach; no wildcard
  int64_t listen_port = 0;                // 0: any free port
  bool shared_memory = true;              // between processes of one host; TCP otherwise
};

// `handler` must outlive the messenger.
Result<std::unique_ptr<Messenger>> make_ucx_messenger(const MessengerOptions& options, MessageHandler& handler);

}  // namespace tandem::comm
