#include "src/sim/sim_agent.h"

#include <cstring>
#include <utility>

namespace tandem::sim {

using transfer::BlockSpan;
using transfer::Done;
using transfer::Handle;
using transfer::KvTransferParams;
using transfer::TransferId;

SimAgent::SimAgent(EventQueue& queue, Random& random, Checker& checker, Place place, model::KvCache& cache,
                   const transfer::AgentOptions& options, std::function<void()> wake)
    : queue_(queue),
      random_(random),
      checker_(checker),
      place_(place),
      engine_id_(fmt::format("{}:{}", options.engine_id, place.name)),
      wake_(std::move(wake)),
      nonces_(place.nonce_seed),
      core_(transfer::KvMemory{cache.base(), cache.layer_stride_bytes(), cache.num_blocks(), cache.layout()}, options,
            engine_id_, queue, [this](Done&& done) {
              checker_.done(place_.node, done);
              done_.push_back(std::move(done));
              --num_open_;
              wake_();
            }) {}

void SimAgent::set_messenger(std::unique_ptr<comm::Messenger> messenger) {
  messenger_ = std::move(messenger);
  core_.set_messenger(messenger_.get());
}

Handle SimAgent::new_handle(TransferId id) {
  Handle handle;
  handle.request = id.value;
  const std::array<uint64_t, 2> bits = {nonces_.next(), nonces_.next()};
  std::memcpy(handle.nonce.data(), bits.data(), handle.nonce.size());
  checker_.give_handle(place_.node, handle.to_string());
  return handle;
}

// ---- Commands ------------------------------------------------------------------------------------------------------

std::string SimAgent::expect(TransferId id, const BlockSpan& span, int64_t deadline_us) {
  const Handle handle = new_handle(id);
  ++num_open_;
  checker_.open(place_.node, id, TransferKind::kExpect, handle.to_string(), span.blocks);
  post([=, this] { core_.expect(id, handle, span, deadline_us); });
  return handle.to_string();
}

void SimAgent::pull(TransferId id, const KvTransferParams& remote, const BlockSpan& span, int64_t deadline_us) {
  ++num_open_;
  checker_.open(place_.node, id, TransferKind::kPull, remote.remote_request_id, span.blocks);
  post([=, this] { core_.pull(id, remote, span, deadline_us); });
}

void SimAgent::begin_send(TransferId id, const KvTransferParams& remote, const BlockSpan& span, int64_t deadline_us) {
  ++num_open_;
  checker_.open(place_.node, id, TransferKind::kSend, remote.remote_request_id, span.blocks);
  post([=, this] { core_.begin_send(id, remote, span, deadline_us); });
}

void SimAgent::send_blocks(TransferId id, int64_t layer, int64_t first, int64_t count) {
  post([=, this] { core_.send_blocks(id, layer, first, count); });
  // The agent may be quicker than the layers of one step.
  if (random_.chance(0.2)) turn();
}

void SimAgent::commit_send(TransferId id, const transfer::FirstToken& first_token) {
  post([=, this] { core_.commit_send(id, first_token); });
}

std::string SimAgent::publish(TransferId id, const BlockSpan& span) {
  const Handle handle = new_handle(id);
  ++num_open_;
  checker_.open(place_.node, id, TransferKind::kPublish, handle.to_string(), span.blocks);
  post([=, this] { core_.publish(id, handle, span); });
  return handle.to_string();
}

void SimAgent::renew_lease(const KvTransferParams& remote) {
  post([=, this] { core_.renew_lease(remote); });
}

void SimAgent::decline(const KvTransferParams& remote, const Hash256& prompt) {
  post([=, this] { core_.decline(remote, prompt); });
}

void SimAgent::release(const std::string& handle) {
  post([=, this] { core_.release(handle); });
}

void SimAgent::abort(TransferId id) {
  post([=, this] { core_.abort(id); });
}

std::vector<Done> SimAgent::take_done() { return std::exchange(done_, {}); }

void SimAgent::post(std::function<void()> command) {
  commands_.push_back(std::move(command));
  plan_turn(queue_.now_us() + random_.range(0, 100));
}

void SimAgent::run_commands() {
  const std::vector<std::function<void()>> commands = std::exchange(commands_, {});
  for (const std::function<void()>& command : commands) command();
}

// ---- The thread of agent.cc, turn by turn -----------------------------------------------------------------------

void SimAgent::turn() {
  run_commands();
  const bool more = core_.pump();
  const int64_t now_us = queue_.now_us();
  if (core_.next_timer_us() <= now_us) core_.run_timers();
  plan_turn(more || !commands_.empty() ? now_us + 5 : core_.next_timer_us());
}

void SimAgent::plan_turn(int64_t at_us) {
  if (at_us == INT64_MAX) return;
  if (turn_at_us_ <= at_us) return;
  turn_at_us_ = at_us;
  const uint64_t number = ++turn_number_;
  queue_.add(at_us, {place_.node, place_.incarnation}, [this, number] {
    if (number != turn_number_) return;
    turn_at_us_ = INT64_MAX;
    turn();
  });
}

// As in production, commands go before what has arrived; after it there may be more to send.
void SimAgent::on_message(comm::ConnectionId connection, std::span<const std::byte> message,
                          std::span<const std::byte> payload) {
  run_commands();
  if (!payload.empty()) checker_.active(place_.node, queue_.now_us());
  core_.on_message(connection, message, payload);
  plan_turn(queue_.now_us() + 5);
}

void SimAgent::on_accept(comm::ConnectionId connection) {
  core_.on_accept(connection);
  plan_turn(queue_.now_us() + 5);
}

void SimAgent::on_sent(comm::ConnectionId connection, uint64_t token) {
  core_.on_sent(connection, token);
  plan_turn(queue_.now_us() + 5);
}

void SimAgent::on_closed(comm::ConnectionId connection, const Error& why) {
  core_.on_closed(connection, why);
  plan_turn(queue_.now_us() + 5);
}

}  // namespace tandem::sim
