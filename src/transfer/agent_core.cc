#include "src/transfer/agent_core.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "src/base/log.h"
#include "src/transfer/checksum.h"

namespace tandem::transfer {
namespace {

constexpr const char* kTag = "transfer";

FaultCode fate_of(const Status& status) {
  if (status.ok()) return FaultCode::kConsumed;
  switch (status.error().kind) {
    case ErrorKind::kAborted: return FaultCode::kAborted;
    case ErrorKind::kDeadlineExceeded: return FaultCode::kExpired;
    default: return FaultCode::kConsumed;
  }
}

const char* describe_fate(FaultCode fate) {
  switch (fate) {
    case FaultCode::kConsumed: return "this handle was used before; a handle works once";
    case FaultCode::kAborted: return "this transfer was aborted";
    case FaultCode::kExpired: return "the lease or the deadline of this transfer has passed";
    default: return "no such handle in this process; did it restart?";
  }
}

// The handle a message is about and the side it is for; nothing for those about the link.
std::optional<std::pair<Side, Handle>> find_target(const Message& message) {
  return std::visit(
      [](const auto& m) -> std::optional<std::pair<Side, Handle>> {
        using M = std::decay_t<decltype(m)>;
        if constexpr (std::is_same_v<M, Hello> || std::is_same_v<M, Refuse>) {
          return std::nullopt;
        } else if constexpr (std::is_same_v<M, Begin> || std::is_same_v<M, Data> || std::is_same_v<M, Commit>) {
          return std::pair(Side::kReceiver, m.handle);
        } else if constexpr (std::is_same_v<M, Accept> || std::is_same_v<M, Pull> || std::is_same_v<M, Ack>) {
          return std::pair(Side::kSender, m.handle);
        } else {
          return std::pair(m.to, m.handle);
        }
      },
      message);
}

}  // namespace

AgentCore::AgentCore(const KvMemory& memory, const AgentOptions& options, std::string engine_id, const Clock& clock,
                     std::function<void(Done&&)> on_done)
    : memory_(memory),
      options_(options),
      hello_{std::move(engine_id), options.model_fingerprint, options.role, options.idle_timeout_us, memory.layout},
      clock_(clock),
      on_done_(std::move(on_done)) {
  CHECK_LE(hello_.engine_id.size(), kMaxNameBytes);
  CHECK_LE(hello_.fingerprint.size(), kMaxNameBytes);
}

// --- commands of the engine -------------------------------------------------------------------------------------------

void AgentCore::refuse_start(TransferId id, Error error) { on_done_(Done{id, std::move(error), std::nullopt, 0, 0}); }

AgentCore::Transfer* AgentCore::add_transfer(TransferId id, const Handle& handle, Side side, const BlockSpan& span) {
  CHECK(!transfers_.contains(id));
  CHECK_GT(span.num_tokens, 0);
  const PartGrid grid(memory_.layout, span.num_tokens);
  CHECK_GE(span.first_block, 0);
  CHECK_LE(span.first_block, grid.num_blocks);
  CHECK_GE(std::ssize(span.blocks), grid.num_blocks - span.first_block);
  for (BlockId block : span.blocks) {
    CHECK_GE(block.value, 0);
    CHECK_LT(block.value, memory_.num_blocks);
  }
  if (num_open() >= kMaxTransfers) {
    refuse_start(id, make_error(ErrorKind::kResourceExhausted, "all {} transfers are in use", kMaxTransfers));
    return nullptr;
  }
  if (!by_handle_.emplace(HandleKey(side, handle), id).second) {
    refuse_start(id, invalid_argument("kv_transfer_params.remote_request_id", "transfer {} is already running",
                                      handle.short_name()));
    return nullptr;
  }
  Transfer& transfer = transfers_[id];
  transfer.id = id;
  transfer.grid = grid;
  transfer.span = span;
  transfer.start_us = clock_.now_us();
  return &transfer;
}

void AgentCore::expect(TransferId id, const Handle& handle, const BlockSpan& span, int64_t deadline_us) {
  Transfer* transfer = add_transfer(id, handle, Side::kReceiver, span);
  if (transfer == nullptr) return;
  ReceiveSpec spec{handle, false, transfer->grid, span.num_tokens, span.first_block, deadline_us,
                   options_.idle_timeout_us};
  transfer->receiver = std::make_unique<ReceiveMachine>(spec, clock_.now_us());
}

void AgentCore::publish(TransferId id, const Handle& handle, const BlockSpan& span) {
  Transfer* transfer = add_transfer(id, handle, Side::kSender, span);
  if (transfer == nullptr) return;
  CHECK_EQ(span.first_block, 0);
  SendSpec spec{handle, true, transfer->grid, span.num_tokens, 0, 0, options_.idle_timeout_us, options_.lease_us};
  transfer->sender = std::make_unique<SendMachine>(spec, clock_.now_us());
}

void AgentCore::pull(TransferId id, const KvTransferParams& remote, const BlockSpan& span, int64_t deadline_us) {
  const std::optional<Handle> handle = parse_handle(remote.remote_request_id);
  if (!handle.has_value()) {
    return refuse_start(id, invalid_argument("kv_transfer_params.remote_request_id",
                                             "not a handle of a publication; use what the prefill response carries"));
  }
  const Result<Link*> link = open_link(remote);
  if (!link.ok()) return refuse_start(id, link.error());
  Transfer* transfer = add_transfer(id, *handle, Side::kReceiver, span);
  if (transfer == nullptr) return;
  ReceiveSpec spec{*handle, true, transfer->grid, span.num_tokens, span.first_block, deadline_us,
                   options_.idle_timeout_us};
  transfer->receiver = std::make_unique<ReceiveMachine>(spec, clock_.now_us());
  transfer->wanted_engine = remote.remote_engine_id;
  attach(*transfer, **link);
  Actions actions;
  transfer->receiver->start(clock_.now_us(), actions);
  perform(*transfer, std::move(actions));
}

void AgentCore::begin_send(TransferId id, const KvTransferParams& remote, const BlockSpan& span, int64_t deadline_us) {
  const std::optional<Handle> handle = parse_handle(remote.remote_request_id);
  if (!handle.has_value()) {
    return refuse_start(id, invalid_argument("kv_transfer_params.remote_request_id",
                                             "not a handle of a reservation; use what the decode side sent"));
  }
  const Result<Link*> link = open_link(remote);
  if (!link.ok()) return refuse_start(id, link.error());
  Transfer* transfer = add_transfer(id, *handle, Side::kSender, span);
  if (transfer == nullptr) return;
  SendSpec spec{*handle, false, transfer->grid, span.num_tokens, span.first_block, deadline_us,
                options_.idle_timeout_us, 0};
  transfer->sender = std::make_unique<SendMachine>(spec, clock_.now_us());
  transfer->wanted_engine = remote.remote_engine_id;
  attach(*transfer, **link);
  if ((*link)->hello.has_value()) transfer->sender->set_peer_idle_timeout((*link)->hello->idle_timeout_us);
  Actions actions;
  transfer->sender->start(clock_.now_us(), actions);
  perform(*transfer, std::move(actions));
}

void AgentCore::send_blocks(TransferId id, int64_t layer, int64_t first, int64_t count) {
  Transfer* transfer = find(id);
  if (transfer == nullptr) return;  // it has ended, and its Done is on the way
  transfer->sender->add_blocks(layer, first, count, clock_.now_us());
  if (sender_queued_.insert(id).second) senders_.push_back(id);
}

void AgentCore::commit_send(TransferId id, const FirstToken& first_token) {
  Transfer* transfer = find(id);
  if (transfer == nullptr) return;
  transfer->sender->commit(first_token, clock_.now_us());
  if (sender_queued_.insert(id).second) senders_.push_back(id);
}

void AgentCore::renew_lease(const KvTransferParams& remote) {
  const std::optional<Handle> handle = parse_handle(remote.remote_request_id);
  if (!handle.has_value()) return;
  const Result<Link*> link = open_link(remote);
  if (link.ok()) tell(**link, Heartbeat{*handle, Side::kSender});
}

void AgentCore::decline(const KvTransferParams& remote) {
  const std::optional<Handle> handle = parse_handle(remote.remote_request_id);
  if (!handle.has_value()) return;
  const Result<Link*> link = open_link(remote);
  if (link.ok()) tell(**link, Abort{*handle, Side::kSender, "the decode side does not need it"});
}

void AgentCore::abort(TransferId id) {
  Transfer* transfer = find(id);
  if (transfer == nullptr) return;
  Actions actions;
  if (transfer->sender) {
    transfer->sender->abort(actions);
  } else {
    transfer->receiver->abort(actions);
  }
  perform(*transfer, std::move(actions));
}

// --- transfers --------------------------------------------------------------------------------------------------------

AgentCore::Transfer* AgentCore::find(TransferId id) {
  const auto found = transfers_.find(id);
  return found == transfers_.end() ? nullptr : &found->second;
}

AgentCore::Transfer* AgentCore::find(Side side, const Handle& handle) {
  const auto found = by_handle_.find(HandleKey(side, handle));
  return found == by_handle_.end() ? nullptr : find(found->second);
}

void AgentCore::perform(Transfer& transfer, Actions&& actions, std::span<const std::byte> payload) {
  for (Action& action : actions) {
    if (Tell* tell_action = std::get_if<Tell>(&action)) {
      const auto link = links_.find(transfer.link);
      if (link != links_.end()) tell(link->second, std::move(tell_action->message));
    } else if (const Write* write = std::get_if<Write>(&action)) {
      write_payload(transfer, *write, payload);
    } else {
      return end_transfer(transfer, std::move(std::get<Finish>(action)));
    }
  }
}

void AgentCore::end_transfer(Transfer& transfer, Finish&& finish) {
  Done done{transfer.id, std::move(finish.status), std::move(finish.first_token), finish.bytes,
            clock_.now_us() - transfer.start_us};
  const comm::ConnectionId link_id = transfer.link;
  if (!done.status.ok() && done.status.error().kind != ErrorKind::kAborted) {
    log_warning(kTag, "{}", done.status.error().message);
  }
  retire(transfer.handle(), transfer.side(), fate_of(done.status));
  const auto link = links_.find(link_id);
  if (link != links_.end()) {
    link->second.transfers.erase(done.id);
    link->second.last_used_us = clock_.now_us();
  }
  transfers_.erase(done.id);
  on_done_(std::move(done));
  // A peer that is silent on the whole link is dropped, so that the next transfer makes a new one.
  if (finish.peer_silent && link != links_.end() &&
      clock_.now_us() - link->second.last_heard_us >= options_.idle_timeout_us) {
    drop_link(link_id, make_error(ErrorKind::kUnavailable, "{} has been silent for {} ms", link->second.peer,
                                  (clock_.now_us() - link->second.last_heard_us) / 1000));
  }
}

void AgentCore::retire(const Handle& handle, Side side, FaultCode fate) {
  const HandleKey key(side, handle);
  by_handle_.erase(key);
  if (retired_.insert_or_assign(key, fate).second) retired_order_.push_back(key);
  if (std::ssize(retired_order_) > kMaxRetired) {
    retired_.erase(retired_order_.front());
    retired_order_.pop_front();
  }
}

std::byte* AgentCore::part_address(const Transfer& transfer, int64_t layer, int64_t part) const {
  const int64_t index = transfer.grid.block_of(part) - transfer.span.first_block;
  CHECK_GE(index, 0);
  CHECK_LT(index, std::ssize(transfer.span.blocks));
  const int64_t block = transfer.span.blocks[static_cast<size_t>(index)].value;
  return memory_.base + layer * memory_.layer_stride_bytes + block * transfer.grid.block_bytes +
         transfer.grid.offset_of(part);
}

void AgentCore::write_payload(const Transfer& transfer, const Write& write, std::span<const std::byte> payload) {
  size_t position = 0;
  for (int64_t part = write.first_part; part < write.first_part + write.num_parts; ++part) {
    const size_t size = static_cast<size_t>(transfer.grid.bytes_of(part));
    CHECK_LE(position + size, payload.size());
    std::memcpy(part_address(transfer, write.layer, part), payload.data() + position, size);
    position += size;
  }
  CHECK_EQ(position, payload.size());
}

// Copies the parts into `buffer`; gives their checksum if they shall have one.
std::optional<uint64_t> AgentCore::stage(const Transfer& transfer, const PartRange& range, std::byte* buffer) const {
  size_t position = 0;
  for (int64_t part = range.first_part; part < range.first_part + range.num_parts; ++part) {
    const size_t size = static_cast<size_t>(transfer.grid.bytes_of(part));
    std::memcpy(buffer + position, part_address(transfer, range.layer, part), size);
    position += size;
  }
  if (!options_.checksum) return std::nullopt;
  return checksum(std::span<const std::byte>(buffer, position));
}

std::unique_ptr<std::byte[]> AgentCore::take_buffer() {
  if (spare_buffers_.empty()) return std::make_unique<std::byte[]>(static_cast<size_t>(comm::kMaxPayloadBytes));
  std::unique_ptr<std::byte[]> buffer = std::move(spare_buffers_.back());
  spare_buffers_.pop_back();
  return buffer;
}

// Senders take turns, one message each, so that a long prompt does not hold up a short one.
bool AgentCore::pump() {
  for (int64_t i = 0; i < kMaxDataPerPump; ++i) {
    if (senders_.empty() || std::ssize(staged_) >= kMaxStagingBuffers) return false;
    const TransferId id = senders_.front();
    senders_.pop_front();
    sender_queued_.erase(id);
    Transfer* transfer = find(id);
    if (transfer == nullptr) continue;
    const bool more = send_next(*transfer);
    if (more && sender_queued_.insert(id).second) senders_.push_back(id);
  }
  return true;
}

// True if a message went out and another may follow.
bool AgentCore::send_next(Transfer& transfer) {
  const TransferId id = transfer.id;
  const auto link = links_.find(transfer.link);
  if (link == links_.end()) return false;
  const int64_t now_us = clock_.now_us();
  const std::optional<PartRange> range = transfer.sender->next_data(now_us);
  if (range.has_value()) {
    std::unique_ptr<std::byte[]> buffer = take_buffer();
    const std::optional<uint64_t> sum = stage(transfer, *range, buffer.get());
    const Data data{transfer.handle(), range->layer, range->first_part, range->num_parts, sum};
    const size_t size = static_cast<size_t>(transfer.grid.bytes_of(range->first_part, range->num_parts));
    const uint64_t token = next_token_++;
    const std::span<const std::byte> payload(buffer.get(), size);
    const comm::SendResult result = messenger_->send(link->first, encode(data), payload, token);
    if (result == comm::SendResult::kClosed) {
      spare_buffers_.push_back(std::move(buffer));
      return false;  // on_closed follows
    }
    if (result == comm::SendResult::kPending) {
      staged_.emplace(token, StagedData{id, std::move(buffer)});
    } else {
      spare_buffers_.push_back(std::move(buffer));
      transfer.sender->data_sent(now_us);
    }
  }
  Actions actions;
  transfer.sender->advance(now_us, actions);
  perform(transfer, std::move(actions));
  return range.has_value();
}

void AgentCore::on_sent(comm::ConnectionId, uint64_t token) {
  const auto found = staged_.find(token);
  CHECK(found != staged_.end());
  spare_buffers_.push_back(std::move(found->second.buffer));
  const TransferId id = found->second.transfer;
  staged_.erase(found);
  Transfer* transfer = find(id);
  if (transfer == nullptr) return;
  transfer->sender->data_sent(clock_.now_us());
  if (sender_queued_.insert(id).second) senders_.push_back(id);
}

void AgentCore::run_timers() {
  const int64_t now_us = clock_.now_us();
  std::vector<TransferId> due;
  for (const auto& [id, transfer] : transfers_) {
    const int64_t at_us = transfer.sender ? transfer.sender->next_expiry_us() : transfer.receiver->next_expiry_us();
    if (at_us <= now_us) due.push_back(id);
  }
  for (TransferId id : due) {
    Transfer* transfer = find(id);
    if (transfer == nullptr) continue;
    Actions actions;
    if (transfer->sender) {
      transfer->sender->expire(now_us, actions);
    } else {
      transfer->receiver->expire(now_us, actions);
    }
    perform(*transfer, std::move(actions));
  }
  std::vector<std::pair<comm::ConnectionId, Error>> ended;
  for (const auto& [id, link] : links_) {
    if (link.deadline_us != 0 && now_us >= link.deadline_us) {
      ended.emplace_back(id, make_error(ErrorKind::kUnavailable, "{} did not answer within {} ms", link.peer,
                                        options_.connect_timeout_us / 1000));
    } else if (link.opened_here && link.transfers.empty() && now_us - link.last_used_us >= kIdleLinkUs) {
      ended.emplace_back(id, make_error(ErrorKind::kUnavailable, "{} was not needed any more", link.peer));
    }
  }
  for (const auto& [id, why] : ended) drop_link(id, why);
}

int64_t AgentCore::next_timer_us() const {
  int64_t next_us = kNever;
  for (const auto& [id, transfer] : transfers_) {
    next_us = std::min(next_us, transfer.sender ? transfer.sender->next_expiry_us() : transfer.receiver->next_expiry_us());
  }
  for (const auto& [id, link] : links_) {
    if (link.deadline_us != 0) next_us = std::min(next_us, link.deadline_us);
    if (link.opened_here && link.transfers.empty()) next_us = std::min(next_us, link.last_used_us + kIdleLinkUs);
  }
  return next_us;
}

// --- links ------------------------------------------------------------------------------------------------------------

// A link to the peer that `remote` names. One to another incarnation at the same address is not used: the peer has
// restarted, or `remote` is from before a restart; a new link will tell which.
Result<AgentCore::Link*> AgentCore::open_link(const KvTransferParams& remote) {
  const std::string address = fmt::format("{}:{}", remote.remote_host, remote.remote_port);
  const auto known = link_by_address_.find(address);
  if (known != link_by_address_.end()) {
    Link& link = links_.at(known->second);
    const bool other = link.hello.has_value() && !remote.remote_engine_id.empty() &&
                       link.hello->engine_id != remote.remote_engine_id;
    if (!other && !link.refused) return &link;
    link_by_address_.erase(known);
    link.address.clear();
    if (link.transfers.empty()) drop_link(link.id, make_error(ErrorKind::kUnavailable, "replaced by a new link"));
  }
  TANDEM_ASSIGN(const comm::ConnectionId id, messenger_->connect(remote.remote_host, remote.remote_port));
  const int64_t now_us = clock_.now_us();
  Link& link = links_[id];
  link.id = id;
  link.address = address;
  link.opened_here = true;
  link.peer = fmt::format("the worker at {}", address);
  link.deadline_us = now_us + options_.connect_timeout_us;
  link.last_used_us = now_us;
  link.last_heard_us = now_us;
  link_by_address_.emplace(address, id);
  tell_now(id, hello_);
  return &link;
}

void AgentCore::attach(Transfer& transfer, Link& link) {
  transfer.link = link.id;
  link.transfers.insert(transfer.id);
  link.last_used_us = clock_.now_us();
}

void AgentCore::tell_now(comm::ConnectionId connection, const Message& message) {
  // A closed connection is reported by on_closed.
  (void)messenger_->send(connection, encode(message));
}

void AgentCore::tell(Link& link, Message&& message) {
  if (link.hello.has_value()) return tell_now(link.id, message);
  if (std::ssize(link.waiting) < kMaxMessagesBeforeHello) link.waiting.push_back(std::move(message));
}

void AgentCore::on_accept(comm::ConnectionId connection) {
  Link& link = links_[connection];
  link.id = connection;
  link.deadline_us = clock_.now_us() + options_.connect_timeout_us;
  link.last_heard_us = clock_.now_us();
  tell_now(connection, hello_);
}

void AgentCore::on_closed(comm::ConnectionId connection, const Error& why) {
  const auto found = links_.find(connection);
  if (found == links_.end()) return;
  Link link = std::move(found->second);
  links_.erase(found);
  if (!link.address.empty()) link_by_address_.erase(link.address);
  fail_transfers(link, make_error(why.kind, "{}: {}", link.peer, why.message));
}

void AgentCore::drop_link(comm::ConnectionId id, const Error& why) {
  if (!links_.contains(id)) return;
  messenger_->close(id);
  on_closed(id, why);
}

void AgentCore::fail_transfers(Link& link, const Error& why) {
  for (TransferId id : std::exchange(link.transfers, {})) {
    Transfer* transfer = find(id);
    if (transfer == nullptr) continue;
    Actions actions;
    if (why.kind == ErrorKind::kUnsupported) {
      // Not a loss: the two sides do not fit together, and no other attempt will change that.
      actions.push_back(Finish{why, std::nullopt, 0});
    } else if (transfer->sender) {
      transfer->sender->lose_peer(why, actions);
    } else {
      transfer->receiver->lose_peer(why, actions);
    }
    perform(*transfer, std::move(actions));
  }
}

void AgentCore::on_hello(Link& link, const Hello& hello) {
  if (link.hello.has_value()) return;
  const Status compatible = check_compatible(hello_, hello);
  if (!compatible.ok()) return refuse_link(link, compatible.error());
  link.hello = hello;
  link.deadline_us = 0;
  link.peer = link.address.empty() ? hello.engine_id : fmt::format("{} at {}", hello.engine_id, link.address);
  log_info(kTag, "linked with {} ({}) over {}", link.peer, kv_role_name(hello.role), messenger_->transport_name(link.id));
  for (TransferId id : std::set<TransferId>(link.transfers)) {
    Transfer& transfer = *find(id);
    if (!transfer.wanted_engine.empty() && transfer.wanted_engine != hello.engine_id) {
      Actions actions;
      const Error restarted = make_error(ErrorKind::kUnavailable, "{} answers instead of {}: it has restarted",
                                         hello.engine_id, transfer.wanted_engine);
      std::erase_if(link.waiting, [&](const Message& message) {
        return find_target(message)->second == transfer.handle();
      });
      if (transfer.sender) {
        transfer.sender->lose_peer(restarted, actions);
      } else {
        transfer.receiver->lose_peer(restarted, actions);
      }
      perform(transfer, std::move(actions));
    } else if (transfer.sender) {
      transfer.sender->set_peer_idle_timeout(hello.idle_timeout_us);
    }
  }
  for (const Message& message : std::exchange(link.waiting, {})) tell_now(link.id, message);
}

// Says why, and closes a little later so that the words arrive.
void AgentCore::refuse_link(Link& link, const Error& why) {
  log_warning(kTag, "refused {}: {}", link.peer, why.message);
  link.refused = true;
  link.deadline_us = clock_.now_us() + kLingerUs;
  link.waiting.clear();
  tell_now(link.id, Refuse{why.message});
  fail_transfers(link, why);
}

// --- messages ---------------------------------------------------------------------------------------------------------

void AgentCore::on_message(comm::ConnectionId connection, std::span<const std::byte> bytes,
                           std::span<const std::byte> payload) {
  const auto found = links_.find(connection);
  if (found == links_.end()) return;
  Link& link = found->second;
  link.last_heard_us = clock_.now_us();
  if (link.refused) return;
  const Result<Message> message = decode(bytes);
  if (!message.ok()) return refuse_link(link, message.error());
  if (const Hello* hello = std::get_if<Hello>(&*message)) return on_hello(link, *hello);
  if (const Refuse* refuse = std::get_if<Refuse>(&*message)) {
    link.refused = true;
    link.deadline_us = clock_.now_us();
    return fail_transfers(link, make_error(ErrorKind::kUnsupported, "{} refused: {}", link.peer, refuse->text));
  }
  if (!link.hello.has_value()) {
    return refuse_link(link, make_error(ErrorKind::kUnavailable, "{} sent '{}' before 'hello'", link.peer,
                                        message_name(*message)));
  }
  dispatch(link, *message, payload);
}

void AgentCore::dispatch(Link& link, const Message& message, std::span<const std::byte> payload) {
  const std::pair<Side, Handle> target = *find_target(message);
  Transfer* transfer = find(target.first, target.second);
  if (transfer == nullptr) return answer_stray(link, message);
  // The first word of a peer binds a reservation or a publication to its link; from then on only that link counts.
  if (transfer->link == comm::ConnectionId()) {
    if (std::holds_alternative<Heartbeat>(message)) {
      if (transfer->sender) {
        Actions none;
        transfer->sender->receive(message, clock_.now_us(), none);
      }
      return;
    }
    attach(*transfer, link);
  } else if (transfer->link != link.id) {
    return tell(link, Fault{target.second, target.first == Side::kSender ? Side::kReceiver : Side::kSender,
                            FaultCode::kConsumed, "this transfer runs with another peer"});
  }
  Actions actions;
  const int64_t now_us = clock_.now_us();
  if (transfer->sender) {
    transfer->sender->set_peer_idle_timeout(link.hello->idle_timeout_us);
    transfer->sender->receive(message, now_us, actions);
    // A request that was refused leaves a publication free for the right one.
    if (transfer->sender->state() == SendMachine::State::kPublished) {
      for (Action& action : actions) tell(link, std::move(std::get<Tell>(action).message));
      link.transfers.erase(transfer->id);
      transfer->link = comm::ConnectionId();
      return;
    }
    if (sender_queued_.insert(transfer->id).second) senders_.push_back(transfer->id);
  } else {
    bool intact = true;
    if (const Data* data = std::get_if<Data>(&message)) {
      intact = !data->checksum.has_value() || *data->checksum == checksum(payload);
    }
    transfer->receiver->receive(message, std::ssize(payload), intact, now_us, actions);
  }
  perform(*transfer, std::move(actions), payload);
}

// A message for a transfer that is not open here. What merely comes late is dropped: the peer knows, or will.
void AgentCore::answer_stray(Link& link, const Message& message) {
  const std::pair<Side, Handle> target = *find_target(message);
  const Side sender_of_message = target.first == Side::kSender ? Side::kReceiver : Side::kSender;
  if (std::holds_alternative<AbortAck>(message) || std::holds_alternative<Fault>(message) ||
      std::holds_alternative<Heartbeat>(message)) {
    return;
  }
  if (std::holds_alternative<Abort>(message)) return tell(link, AbortAck{target.second, sender_of_message});
  const auto retired = retired_.find(HandleKey(target.first, target.second));
  const bool opens = std::holds_alternative<Begin>(message) || std::holds_alternative<Pull>(message);
  if (retired != retired_.end() && !opens) return;
  const FaultCode code = retired == retired_.end() ? FaultCode::kUnknownHandle : retired->second;
  tell(link, Fault{target.second, sender_of_message, code, describe_fate(code)});
}

}  // namespace tandem::transfer
