// AgentCore, second half: who is at the other end of a connection, and what to do with its messages.
#include <utility>

#include "src/base/log.h"
#include "src/transfer/agent_core.h"
#include "src/transfer/checksum.h"

namespace tandem::transfer {
namespace {

constexpr const char* kTag = "transfer";

const char* describe_fate(FaultCode fate) {
  switch (fate) {
    case FaultCode::kConsumed:
      return "this handle was used before; a handle works once";
    case FaultCode::kAborted:
      return "this transfer was aborted";
    case FaultCode::kExpired:
      return "the lease or the deadline of this transfer has passed";
    default:
      return "no such handle in this process; did it restart?";
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

// --- links ---

// Whether somebody else is at the other end than who is wanted; false as long as nobody has said hello.
bool AgentCore::is_another(const Link& link, const std::string& wanted_engine) {
  return link.hello.has_value() && !wanted_engine.empty() && link.hello->engine_id != wanted_engine;
}

// A link to the peer that `remote` names. If another incarnation is at the other end of the one we have, the peer has
// restarted, or `remote` is from before a restart or made up. A second link, one at a time, will tell which; until its
// hello the first one serves all others, so that what a client writes there never costs a peer its link.
Result<AgentCore::Link*> AgentCore::open_link(const KvTransferParams& remote) {
  const std::string address = fmt::format("{}:{}", remote.remote_host, remote.remote_port);
  bool is_candidate = false;
  if (const auto known = link_by_address_.find(address); known != link_by_address_.end()) {
    Link& link = links_.at(known->second);
    if (link.refused) {
      link.displaced = true;
      link_by_address_.erase(known);
    } else if (is_another(link, remote.remote_engine_id)) {
      is_candidate = true;
    } else {
      return &link;
    }
  }
  if (const auto asked = candidate_by_address_.find(address); asked != candidate_by_address_.end()) {
    Link& candidate = links_.at(asked->second);
    if (!candidate.refused) {
      if (!is_candidate) {
        link_by_address_.emplace(address, candidate.id);
        candidate_by_address_.erase(asked);
      }
      return &candidate;
    }
    candidate.displaced = true;
    candidate_by_address_.erase(asked);
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
  (is_candidate ? candidate_by_address_ : link_by_address_).emplace(address, id);
  tell_now(id, hello_);
  return &link;
}

// For what is no part of a transfer and needs no answer. Dropped if somebody else than it is meant for is there.
void AgentCore::tell_once(const KvTransferParams& remote, Message&& message) {
  const auto known = link_by_address_.find(fmt::format("{}:{}", remote.remote_host, remote.remote_port));
  if (known != link_by_address_.end() && is_another(links_.at(known->second), remote.remote_engine_id)) return;
  const Result<Link*> link = open_link(remote);
  if (link.ok()) tell(**link, std::move(message), remote.remote_engine_id);
}

// The second link to an address has said hello. If the same process is there as at the end of the first, that one stays.
void AgentCore::settle_candidate(Link& link) {
  const auto asked = candidate_by_address_.find(link.address);
  if (asked == candidate_by_address_.end() || asked->second != link.id) return;
  candidate_by_address_.erase(asked);
  const auto first = link_by_address_.find(link.address);
  if (first != link_by_address_.end()) {
    Link& other = links_.at(first->second);
    if (!other.refused && !is_another(other, link.hello->engine_id)) {
      link.displaced = true;
      return;
    }
    other.displaced = true;
  }
  link_by_address_[link.address] = link.id;
}

void AgentCore::attach(Transfer& transfer, Link& link) {
  transfer.link = link.id;
  transfer.peer = count_as(link);
  link.transfers.insert(transfer.id);
  link.last_used_us = clock_.now_us();
}

// Done::peer.
std::string AgentCore::count_as(const Link& link) {
  if (!link.hello.has_value()) return link.address.empty() ? "nobody" : link.address;
  return link.hello->engine_id.substr(0, link.hello->engine_id.rfind(':'));
}

// From now on a receiver knows how the blocks that come are cut; nothing yet if the peer has not said hello.
void AgentCore::meet_sender(Transfer& transfer, const Link& link) {
  if (!link.hello.has_value() || transfer.receiver == nullptr) return;
  transfer.map = link.map;
  transfer.grid = PartGrid(link.hello->layout, transfer.span.num_tokens, messenger_->max_payload_bytes());
  transfer.receiver->set_sender_grid(transfer.grid);
}

void AgentCore::tell_now(comm::ConnectionId connection, const Message& message) {
  // A closed connection is reported by on_closed.
  (void)messenger_->send(connection, encode(message));
}

// `wanted_engine` matters before the hello only: afterwards a link is not given to who wants another engine.
void AgentCore::tell(Link& link, Message&& message, const std::string& wanted_engine) {
  if (link.hello.has_value()) return tell_now(link.id, message);
  if (std::ssize(link.waiting) < kMaxMessagesBeforeHello) link.waiting.push_back({std::move(message), wanted_engine});
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
  for (auto* links : {&link_by_address_, &candidate_by_address_}) {
    const auto entry = links->find(link.address);
    if (entry != links->end() && entry->second == connection) links->erase(entry);
  }
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
  link.map = std::make_shared<const BlockMap>(hello.layout, memory_.layout);
  link.deadline_us = 0;
  link.peer = link.address.empty() ? hello.engine_id : fmt::format("{} at {}", hello.engine_id, link.address);
  const int64_t theirs = hello.layout.block_size;
  const int64_t ours = memory_.layout.block_size;
  log_info(kTag, "linked with {} ({}) over {}{}", link.peer, kv_role_name(hello.role),
           messenger_->transport_name(link.id),
           theirs == ours ? "" : fmt::format("; its blocks have {} tokens, ours {}", theirs, ours));
  settle_candidate(link);
  std::erase_if(link.waiting, [&](const WaitingMessage& entry) { return is_another(link, entry.wanted_engine); });
  for (TransferId id : std::set<TransferId>(link.transfers)) {
    Transfer& transfer = *find(id);
    transfer.peer = count_as(link);
    if (is_another(link, transfer.wanted_engine)) {
      Actions actions;
      const Error restarted =
          make_error(ErrorKind::kUnavailable, "{} answers instead of {}: it has restarted, or the id is wrong",
                     hello.engine_id, transfer.wanted_engine);
      if (transfer.sender) {
        transfer.sender->lose_peer(restarted, actions);
      } else {
        transfer.receiver->lose_peer(restarted, actions);
      }
      perform(transfer, std::move(actions));
    } else if (transfer.sender) {
      transfer.sender->set_peer_idle_timeout(hello.idle_timeout_us);
    } else {
      meet_sender(transfer, link);
    }
  }
  for (const WaitingMessage& entry : std::exchange(link.waiting, {})) tell_now(link.id, entry.message);
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

// --- messages ---

void AgentCore::on_message(comm::ConnectionId connection, std::span<const std::byte> message,
                           std::span<const std::byte> payload) {
  handle(connection, message, Payload{payload});
}

void AgentCore::on_borrowed_message(comm::ConnectionId connection, std::span<const std::byte> message,
                                    const comm::BorrowedPayload& payload) {
  handle(connection, message, Payload{{}, &payload, 0});
}

// Looks and changes nothing: what is wrong with a message is said when it is whole.
bool AgentCore::find_place(comm::ConnectionId connection, std::span<const std::byte> bytes, int64_t payload_bytes,
                           std::vector<comm::MutableByteSpan>& pieces) {
  const auto link = links_.find(connection);
  if (link == links_.end() || link->second.refused || !link->second.hello.has_value()) return false;
  const Result<Message> message = decode(bytes);
  const Data* data = message.ok() ? std::get_if<Data>(&*message) : nullptr;
  if (data == nullptr) return false;
  const Transfer* transfer = find(Side::kReceiver, data->handle);
  if (transfer == nullptr || transfer->link != connection) return false;
  const std::optional<Write> place = transfer->receiver->find_place(*data, payload_bytes);
  // Short pieces cost more calls to the kernel than a copy; and bytes of several payloads that nobody wants would meet.
  return place.has_value() && transfer->map->is_by_token() && list_places(*transfer, *place, pieces);
}

void AgentCore::on_placed_message(comm::ConnectionId connection, std::span<const std::byte> message,
                                  int64_t payload_bytes) {
  handle(connection, message, Payload{{}, nullptr, payload_bytes});
}

void AgentCore::handle(comm::ConnectionId connection, std::span<const std::byte> bytes, const Payload& payload) {
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
    return refuse_link(
        link, make_error(ErrorKind::kUnavailable, "{} sent '{}' before 'hello'", link.peer, message_name(*message)));
  }
  dispatch(link, *message, payload);
}

void AgentCore::dispatch(Link& link, const Message& message, const Payload& payload) {
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
    meet_sender(*transfer, link);
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
  } else if (!receive(*transfer, message, payload, actions)) {
    return;
  }
  perform(*transfer, std::move(actions), payload);
}

// A payload that stays is looked at before it is written. One that its owner may take back has to be written first, to
// the place where it would go; it counts only if it was still lent when that was done. One that was read to its place
// counts only if that is still the place.
bool AgentCore::receive(Transfer& transfer, const Message& message, const Payload& payload, Actions& actions) {
  bool intact = true;
  const Data* data = std::get_if<Data>(&message);
  if (data != nullptr && payload.is_written()) {
    const std::optional<Write> place = transfer.receiver->find_place(*data, payload.size());
    if (!place.has_value() && payload.borrowed == nullptr) return false;
    if (place.has_value()) {
      if (payload.borrowed != nullptr) {
        write_payload(transfer, *place, payload.borrowed->pieces());
        if (!payload.borrowed->is_valid()) return false;
      }
      if (data->checksum.has_value()) {
        std::vector<comm::MutableByteSpan> places;
        list_places(transfer, *place, places);
        intact = *data->checksum == checksum(std::vector<comm::ByteSpan>(places.begin(), places.end()));
      }
    }
  } else if (data != nullptr) {
    intact = !data->checksum.has_value() || *data->checksum == checksum(payload.bytes);
  }
  transfer.receiver->receive(message, payload.size(), intact, clock_.now_us(), actions);
  return true;
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
