#include "src/transfer/agent_core.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "src/base/log.h"
#include "src/transfer/checksum.h"

namespace tandem::transfer {
namespace {

constexpr const char* kTag = "transfer";

// `was_used`: a peer has presented the handle.
FaultCode fate_of(const Status& status, bool was_used) {
  if (status.ok()) return FaultCode::kConsumed;
  switch (status.error().kind) {
    case ErrorKind::kAborted:
      return FaultCode::kAborted;
    case ErrorKind::kDeadlineExceeded:
      return FaultCode::kExpired;
    case ErrorKind::kUnavailable:
      // A reservation without deadline that nobody came for in time is not its late reader's mistake.
      return was_used ? FaultCode::kConsumed : FaultCode::kExpired;
    default:
      return FaultCode::kConsumed;
  }
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

// --- commands of the engine ---

void AgentCore::refuse_start(TransferId id, Error error) { on_done_(Done{id, std::move(error), std::nullopt, 0, 0}); }

AgentCore::Transfer* AgentCore::add_transfer(TransferId id, const Handle& handle, Side side, const BlockSpan& span) {
  CHECK(!transfers_.contains(id));
  CHECK_GT(span.num_tokens, 0);
  // A receiver gets the grid of its sender instead, when it meets it.
  const PartGrid grid(memory_.layout, span.num_tokens, messenger_->max_payload_bytes());
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
  transfer.num_blocks = grid.num_blocks;
  transfer.span = span;
  transfer.start_us = clock_.now_us();
  return &transfer;
}

// num_tokens if nothing is missing.
int64_t AgentCore::first_missing_token(const BlockSpan& span) const {
  return std::min(span.first_block * memory_.layout.block_size, span.num_tokens);
}

void AgentCore::expect(TransferId id, const Handle& handle, const BlockSpan& span, int64_t deadline_us) {
  Transfer* transfer = add_transfer(id, handle, Side::kReceiver, span);
  if (transfer == nullptr) return;
  transfer->receiver = std::make_unique<ReceiveMachine>(
      ReceiveSpec{handle, false, span.num_tokens, first_missing_token(span), deadline_us, options_.idle_timeout_us,
                  span.prompt},
      clock_.now_us());
}

void AgentCore::publish(TransferId id, const Handle& handle, const BlockSpan& span) {
  Transfer* transfer = add_transfer(id, handle, Side::kSender, span);
  if (transfer == nullptr) return;
  CHECK_EQ(span.first_block, 0);
  SendSpec spec{handle, true, transfer->grid, span.num_tokens, 0, 0, options_.idle_timeout_us, options_.lease_us};
  spec.prompt = span.prompt;
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
  transfer->receiver = std::make_unique<ReceiveMachine>(
      ReceiveSpec{*handle, true, span.num_tokens, first_missing_token(span), deadline_us, options_.idle_timeout_us,
                  span.prompt},
      clock_.now_us());
  transfer->wanted_engine = remote.remote_engine_id;
  attach(*transfer, **link);
  meet_sender(*transfer, **link);
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
  SendSpec spec{*handle,          false,       transfer->grid,           span.num_tokens,
                span.first_block, deadline_us, options_.idle_timeout_us, 0};
  spec.prompt = span.prompt;
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
  tell_once(remote, Heartbeat{*handle, Side::kSender});
}

void AgentCore::decline(const KvTransferParams& remote, const Hash256& prompt) {
  const std::optional<Handle> handle = parse_handle(remote.remote_request_id);
  if (!handle.has_value()) return;
  if (find(Side::kReceiver, *handle) != nullptr) return;  // another request of this process is fetching it
  tell_once(remote, Abort{*handle, Side::kSender, "the decode side does not need it", prompt});
}

void AgentCore::release(const std::string& text) {
  const std::optional<Handle> handle = parse_handle(text);
  const Transfer* transfer = handle.has_value() ? find(Side::kSender, *handle) : nullptr;
  if (transfer != nullptr && transfer->sender->is_publication()) abort(transfer->id);
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

// --- transfers ---

AgentCore::Transfer* AgentCore::find(TransferId id) {
  const auto found = transfers_.find(id);
  return found == transfers_.end() ? nullptr : &found->second;
}

AgentCore::Transfer* AgentCore::find(Side side, const Handle& handle) {
  const auto found = by_handle_.find(HandleKey(side, handle));
  return found == by_handle_.end() ? nullptr : find(found->second);
}

void AgentCore::perform(Transfer& transfer, Actions&& actions, const Payload& payload) {
  for (Action& action : actions) {
    if (Tell* tell_action = std::get_if<Tell>(&action)) {
      const auto link = links_.find(transfer.link);
      if (link != links_.end()) tell(link->second, std::move(tell_action->message), transfer.wanted_engine);
    } else if (const Write* write = std::get_if<Write>(&action)) {
      if (!payload.is_written()) write_payload(transfer, *write, std::span(&payload.bytes, 1));
    } else {
      return end_transfer(transfer, std::move(std::get<Finish>(action)));
    }
  }
}

// What the messenger still reads in our blocks must not count any more, because Done gives them back.
void AgentCore::take_back(Transfer& transfer) {
  for (const uint64_t token : transfer.lent) {
    messenger_->revoke(transfer.link, token);
    CHECK_EQ(staged_.erase(token), 1U);
    --num_lent_;
  }
  transfer.lent.clear();
}

void AgentCore::end_transfer(Transfer& transfer, Finish&& finish) {
  take_back(transfer);
  Done done{transfer.id, std::move(finish.status), std::move(finish.first_token), finish.bytes,
            clock_.now_us() - transfer.start_us, std::move(transfer.peer)};
  const comm::ConnectionId link_id = transfer.link;
  if (!done.status.ok() && done.status.error().kind != ErrorKind::kAborted) {
    log_debug(kTag, "{}", done.status.error().message);  // its owner knows which request that was
  }
  retire(transfer.handle(), transfer.side(), fate_of(done.status, link_id != comm::ConnectionId()));
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

// Of block `block` of the prompt, which must be one of the span.
std::byte* AgentCore::block_address(const Transfer& transfer, int64_t layer, int64_t block) const {
  const int64_t index = block - transfer.span.first_block;
  CHECK_GE(index, 0);
  CHECK_LT(index, std::ssize(transfer.span.blocks));
  return memory_.base + layer * memory_.layer_stride_bytes +
         transfer.span.blocks[static_cast<size_t>(index)].value * memory_.layout.block_bytes();
}

namespace {

// Neighbours are one piece.
template <typename Span>
void add_piece(std::vector<Span>& pieces, const Span piece) {
  if (!pieces.empty() && pieces.back().data() + pieces.back().size() == piece.data()) {
    pieces.back() = {pieces.back().data(), pieces.back().size() + piece.size()};
  } else {
    pieces.push_back(piece);
  }
}

}  // namespace

// Where the parts that a sender sends lie in its blocks, in order.
std::vector<comm::ByteSpan> AgentCore::list_sources(const Transfer& transfer, const PartRange& parts) const {
  std::vector<comm::ByteSpan> pieces;
  const PartGrid& grid = transfer.grid;
  for (int64_t part = parts.first_part; part < parts.first_part + parts.num_parts; ++part) {
    add_piece(pieces, comm::ByteSpan(block_address(transfer, parts.layer, grid.block_of(part)) + grid.offset_of(part),
                                     static_cast<size_t>(grid.bytes_of(part))));
  }
  return pieces;
}

// Where a receiver puts parts of the sender's blocks, in the order of their bytes. What it has already, and what lies
// behind its last block, goes nowhere; false if there is such.
bool AgentCore::list_places(const Transfer& transfer, const Write& parts, std::vector<comm::MutableByteSpan>& pieces) {
  const PartGrid& grid = transfer.grid;
  bool all_wanted = true;
  int64_t position = 0;  // in the payload
  std::vector<CopyRun> runs;
  for (int64_t part = parts.first_part; part < parts.first_part + parts.num_parts; ++part) {
    runs.clear();
    transfer.map->find(grid.block_of(part), grid.offset_of(part), grid.offset_of(part) + grid.bytes_of(part), runs);
    for (const CopyRun& run : runs) {
      const size_t bytes = static_cast<size_t>(run.bytes);
      if (run.block >= transfer.span.first_block && run.block < transfer.num_blocks) {
        add_piece(pieces,
                  comm::MutableByteSpan(block_address(transfer, parts.layer, run.block) + run.offset, bytes));
      } else {
        all_wanted = false;
        if (nowhere_ == nullptr) nowhere_ = std::make_unique<std::byte[]>(static_cast<size_t>(grid.max_part_bytes));
        CHECK_LE(position + run.bytes, grid.max_part_bytes);
        add_piece(pieces, comm::MutableByteSpan(nowhere_.get() + position, bytes));
      }
      position += run.bytes;
    }
  }
  return all_wanted;
}

void AgentCore::write_payload(const Transfer& transfer, const Write& write, std::span<const comm::ByteSpan> payload) {
  std::vector<comm::MutableByteSpan> places;
  list_places(transfer, write, places);
  auto place = places.begin();
  for (comm::ByteSpan piece : payload) {
    while (!piece.empty()) {
      CHECK(place != places.end());
      const size_t count = std::min(piece.size(), place->size());
      std::memcpy(place->data(), piece.data(), count);
      piece = piece.subspan(count);
      *place = place->subspan(count);
      if (place->empty()) ++place;
    }
  }
  CHECK(place == places.end());
}

comm::ByteSpan AgentCore::stage(std::span<const comm::ByteSpan> pieces, std::byte* buffer) const {
  size_t size = 0;
  for (const comm::ByteSpan piece : pieces) {
    CHECK_LE(static_cast<int64_t>(size + piece.size()), kStagedBytes);
    std::memcpy(buffer + size, piece.data(), piece.size());
    size += piece.size();
  }
  return {buffer, size};
}

bool AgentCore::wants_checksum(comm::ConnectionId link) const {
  if (options_.checksum != KvChecksum::kAuto) return options_.checksum == KvChecksum::kOn;
  return messenger_->wants_checksum(link);
}

std::unique_ptr<std::byte[]> AgentCore::take_buffer() {
  if (spare_buffers_.empty()) return std::make_unique<std::byte[]>(static_cast<size_t>(kStagedBytes));
  std::unique_ptr<std::byte[]> buffer = std::move(spare_buffers_.back());
  spare_buffers_.pop_back();
  return buffer;
}

// Senders take turns, one message each, so that a long prompt does not hold up a short one.
bool AgentCore::pump() {
  for (int64_t i = 0; i < kMaxDataPerPump; ++i) {
    if (senders_.empty() || num_staged() >= kMaxStaged || num_lent_ >= kMaxLent) return false;
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

// Hands one message to the messenger; false if the link is closing.
bool AgentCore::send_part(Transfer& transfer, comm::ConnectionId link, const PartRange& range) {
  const std::vector<comm::ByteSpan> pieces = list_sources(transfer, range);
  const uint64_t token = next_token_++;
  Data data{transfer.handle(), range.layer, range.first_part, range.num_parts, std::nullopt};
  std::unique_ptr<std::byte[]> buffer;
  comm::SendResult result = comm::SendResult::kClosed;
  const bool sums = wants_checksum(link);
  if (messenger_->takes_pieces(link)) {
    if (sums) data.checksum = checksum(pieces);
    result = messenger_->send_pieces(link, encode(data), pieces, token);
  } else {
    buffer = take_buffer();
    const comm::ByteSpan payload = stage(pieces, buffer.get());
    if (sums) data.checksum = checksum(payload);
    result = messenger_->send(link, encode(data), payload, token);
  }
  if (result == comm::SendResult::kPending) {
    if (buffer == nullptr) {
      transfer.lent.insert(token);
      ++num_lent_;
    }
    staged_.emplace(token, StagedData{transfer.id, std::move(buffer)});
    return true;
  }
  if (buffer != nullptr) spare_buffers_.push_back(std::move(buffer));
  if (result == comm::SendResult::kSent) transfer.sender->data_sent(clock_.now_us());
  return result == comm::SendResult::kSent;
}

// True if a message went out and another may follow.
bool AgentCore::send_next(Transfer& transfer) {
  const auto link = links_.find(transfer.link);
  if (link == links_.end()) return false;
  const int64_t now_us = clock_.now_us();
  const std::optional<PartRange> range = transfer.sender->next_data(now_us);
  if (range.has_value() && !send_part(transfer, link->first, *range)) return false;  // on_closed follows
  Actions actions;
  transfer.sender->advance(now_us, actions);
  perform(transfer, std::move(actions));
  return range.has_value();
}

void AgentCore::on_sent(comm::ConnectionId, uint64_t token) {
  const auto found = staged_.find(token);
  CHECK(found != staged_.end());
  if (found->second.buffer != nullptr) {
    spare_buffers_.push_back(std::move(found->second.buffer));
  } else {
    --num_lent_;
  }
  const TransferId id = found->second.transfer;
  staged_.erase(found);
  Transfer* transfer = find(id);
  if (transfer == nullptr) return;
  transfer->lent.erase(token);
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
    } else if (link.displaced && !link.refused && link.transfers.empty()) {
      ended.emplace_back(id, make_error(ErrorKind::kUnavailable, "{} is served by another link", link.peer));
    } else if (link.opened_here && link.transfers.empty() && now_us - link.last_used_us >= kIdleLinkUs) {
      ended.emplace_back(id, make_error(ErrorKind::kUnavailable, "{} was not needed any more", link.peer));
    }
  }
  for (const auto& [id, why] : ended) drop_link(id, why);
}

int64_t AgentCore::next_timer_us() const {
  int64_t next_us = kNever;
  for (const auto& [id, transfer] : transfers_) {
    next_us =
        std::min(next_us, transfer.sender ? transfer.sender->next_expiry_us() : transfer.receiver->next_expiry_us());
  }
  for (const auto& [id, link] : links_) {
    if (link.deadline_us != 0) next_us = std::min(next_us, link.deadline_us);
    if (link.opened_here && link.transfers.empty()) {
      next_us = std::min(next_us, link.displaced && !link.refused ? clock_.now_us() : link.last_used_us + kIdleLinkUs);
    }
  }
  return next_us;
}

}  // namespace tandem::transfer
