// The production AgentCore behind the engine's Agent, as agent.cc binds it to a thread: here to the event queue.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "src/sim/checker.h"
#include "src/sim/event_queue.h"
#include "src/sim/network.h"
#include "src/sim/random.h"
#include "src/transfer/agent_core.h"

namespace tandem::sim {

class SimAgent final : public transfer::Agent, public comm::MessageHandler {
 public:
  struct Place {
    int node = 0;
    uint64_t incarnation = 0;
    uint64_t name = 0;        // the incarnation that peers are told
    uint64_t nonce_seed = 0;  // of the handles given out by this life
  };
  SimAgent(EventQueue& queue, Random& random, Checker& checker, Place place, model::KvCache& cache,
           const transfer::AgentOptions& options, std::function<void()> wake);

  // Before anything else.
  void set_messenger(std::unique_ptr<comm::Messenger> messenger);
  const transfer::AgentCore& core() const { return core_; }

  // transfer::Agent: commands wait for the agent's next turn, which may come at once or later.
  const std::string& engine_id() const override { return engine_id_; }
  int64_t port() const override { return messenger_->port(); }
  // A handle comes from the generator of this life, not from the kernel.
  std::string expect(transfer::TransferId id, const transfer::BlockSpan& span, int64_t deadline_us) override;
  void pull(transfer::TransferId id, const transfer::KvTransferParams& remote, const transfer::BlockSpan& span,
            int64_t deadline_us) override;
  void begin_send(transfer::TransferId id, const transfer::KvTransferParams& remote, const transfer::BlockSpan& span,
                  int64_t deadline_us) override;
  void send_blocks(transfer::TransferId id, int64_t layer, int64_t first, int64_t count) override;
  void commit_send(transfer::TransferId id, const transfer::FirstToken& first_token) override;
  std::string publish(transfer::TransferId id, const transfer::BlockSpan& span) override;
  void renew_lease(const transfer::KvTransferParams& remote) override;
  void decline(const transfer::KvTransferParams& remote, const Hash256& prompt) override;
  void release(const std::string& handle) override;
  void abort(transfer::TransferId id) override;
  std::vector<transfer::Done> take_done() override;
  int64_t num_open() const override { return num_open_; }

  // comm::MessageHandler
  void on_accept(comm::ConnectionId connection) override;
  void on_message(comm::ConnectionId connection, std::span<const std::byte> message,
                  std::span<const std::byte> payload) override;
  void on_sent(comm::ConnectionId connection, uint64_t token) override;
  void on_closed(comm::ConnectionId connection, const Error& why) override;

 private:
  void post(std::function<void()> command);
  void run_commands();
  void turn();
  // The next turn: soon, or when a timer is due.
  void plan_turn(int64_t at_us);
  transfer::Handle new_handle(transfer::TransferId id);

  EventQueue& queue_;
  Random& random_;
  Checker& checker_;
  const Place place_;
  const std::string engine_id_;
  const std::function<void()> wake_;
  Random nonces_;
  transfer::AgentCore core_;
  std::unique_ptr<comm::Messenger> messenger_;  // goes before the core, which it calls

  std::vector<std::function<void()>> commands_;
  std::vector<transfer::Done> done_;
  int64_t num_open_ = 0;
  int64_t turn_at_us_ = INT64_MAX;  // of the turn that is planned
  uint64_t turn_number_ = 0;        // of that turn; events of others are stale
};

}  // namespace tandem::sim
