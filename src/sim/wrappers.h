// Wrappers that change nothing, for tests that let one part misbehave.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "src/comm/messenger.h"
#include "src/transfer/agent.h"

namespace tandem::sim {

class AgentWrapper : public transfer::Agent {
 public:
  explicit AgentWrapper(std::unique_ptr<transfer::Agent> inner) : inner_(std::move(inner)) {}

  const std::string& engine_id() const override { return inner_->engine_id(); }
  int64_t port() const override { return inner_->port(); }
  std::string expect(transfer::TransferId id, const transfer::BlockSpan& span, int64_t deadline_us) override {
    return inner_->expect(id, span, deadline_us);
  }
  void pull(transfer::TransferId id, const transfer::KvTransferParams& remote, const transfer::BlockSpan& span,
            int64_t deadline_us) override {
    inner_->pull(id, remote, span, deadline_us);
  }
  void begin_send(transfer::TransferId id, const transfer::KvTransferParams& remote, const transfer::BlockSpan& span,
                  int64_t deadline_us) override {
    inner_->begin_send(id, remote, span, deadline_us);
  }
  void send_blocks(transfer::TransferId id, int64_t layer, int64_t first, int64_t count) override {
    inner_->send_blocks(id, layer, first, count);
  }
  void commit_send(transfer::TransferId id, const transfer::FirstToken& first_token) override {
    inner_->commit_send(id, first_token);
  }
  std::string publish(transfer::TransferId id, const transfer::BlockSpan& span) override {
    return inner_->publish(id, span);
  }
  void renew_lease(const transfer::KvTransferParams& remote) override { inner_->renew_lease(remote); }
  void decline(const transfer::KvTransferParams& remote, const Hash256& prompt) override {
    inner_->decline(remote, prompt);
  }
  void release(const std::string& handle) override { inner_->release(handle); }
  void abort(transfer::TransferId id) override { inner_->abort(id); }
  std::vector<transfer::Done> take_done() override { return inner_->take_done(); }
  int64_t num_open() const override { return inner_->num_open(); }

 protected:
  std::unique_ptr<transfer::Agent> inner_;
};

class MessengerWrapper : public comm::Messenger {
 public:
  explicit MessengerWrapper(std::unique_ptr<comm::Messenger> inner) : inner_(std::move(inner)) {}

  int64_t port() const override { return inner_->port(); }
  Result<comm::ConnectionId> connect(const std::string& host, int64_t port) override {
    return inner_->connect(host, port);
  }
  comm::SendResult send(comm::ConnectionId connection, std::span<const std::byte> message,
                        std::span<const std::byte> payload, uint64_t token) override {
    return inner_->send(connection, message, payload, token);
  }
  int64_t max_payload_bytes() const override { return inner_->max_payload_bytes(); }
  bool takes_pieces(comm::ConnectionId connection) const override { return inner_->takes_pieces(connection); }
  comm::SendResult send_pieces(comm::ConnectionId connection, std::span<const std::byte> message,
                               std::span<const comm::ByteSpan> pieces, uint64_t token) override {
    return inner_->send_pieces(connection, message, pieces, token);
  }
  void revoke(comm::ConnectionId connection, uint64_t token) override { inner_->revoke(connection, token); }
  bool wants_checksum(comm::ConnectionId connection) const override { return inner_->wants_checksum(connection); }
  void close(comm::ConnectionId connection) override { inner_->close(connection); }
  std::string transport_name(comm::ConnectionId connection) const override {
    return inner_->transport_name(connection);
  }
  void poll(int64_t timeout_us) override { inner_->poll(timeout_us); }
  void wake() override { inner_->wake(); }

 protected:
  std::unique_ptr<comm::Messenger> inner_;
};

class HandlerWrapper : public comm::MessageHandler {
 public:
  explicit HandlerWrapper(comm::MessageHandler& inner) : inner_(inner) {}

  void on_accept(comm::ConnectionId connection) override { inner_.on_accept(connection); }
  void on_message(comm::ConnectionId connection, std::span<const std::byte> message,
                  std::span<const std::byte> payload) override {
    inner_.on_message(connection, message, payload);
  }
  void on_borrowed_message(comm::ConnectionId connection, std::span<const std::byte> message,
                           const comm::BorrowedPayload& payload) override {
    inner_.on_borrowed_message(connection, message, payload);
  }
  bool find_place(comm::ConnectionId connection, std::span<const std::byte> message, int64_t payload_bytes,
                  std::vector<comm::MutableByteSpan>& pieces) override {
    return inner_.find_place(connection, message, payload_bytes, pieces);
  }
  void on_placed_message(comm::ConnectionId connection, std::span<const std::byte> message,
                         int64_t payload_bytes) override {
    inner_.on_placed_message(connection, message, payload_bytes);
  }
  void on_sent(comm::ConnectionId connection, uint64_t token) override { inner_.on_sent(connection, token); }
  void on_closed(comm::ConnectionId connection, const Error& why) override { inner_.on_closed(connection, why); }

 protected:
  comm::MessageHandler& inner_;
};

}  // namespace tandem::sim
