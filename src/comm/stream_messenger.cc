#include "src/comm/stream_messenger.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "src/base/log.h"
#include "src/comm/meeting.h"

namespace tandem::comm {
namespace {

constexpr int kMaxEvents = 64;               // taken from the kernel at a time
constexpr int kMaxReads = 8;                 // of one connection, so that it does not starve the others
constexpr size_t kAheadBytes = 4096;         // read into the buffer while it is not known what comes
constexpr int kMaxLastReads = 4096;          // when a peer is lost: it may have spoken before
constexpr uint64_t kReadsPerNote = 64;       // borrowed payloads between two words to their owner, half of what a transfer may lend
constexpr size_t kRunBytes = 256 * 1024;     // on one stream before the next has its turn; a receiver's buffer
constexpr int64_t kFlushUs = 50'000;         // at the end, for what the peers have not taken
constexpr int64_t kFlushStepUs = 500;
constexpr int64_t kLookAgainUs = 20;         // after traffic, before sleeping …
constexpr int64_t kBulkLookAgainUs = 60;     // … and so long, if since the last sleep as many bytes have moved:
constexpr int64_t kBulkBytes = 2 << 20;
constexpr int64_t kMaxSleepUs = 1'000'000;   // while somebody is greeting
constexpr size_t kMaxBlanks = 256;

}  // namespace

// --- start and stop ---

Status StreamMessenger::start(const MessengerOptions& options) {
  options_ = options;
  TANDEM_ASSIGN(SocketAddress address, look_up_address(options.listen_host, options.listen_port));
  TANDEM_ASSIGN(device_, find_device(address));
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  CHECK_GE(epoll_fd_, 0);
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  CHECK_GE(wake_fd_, 0);
  watch(EPOLL_CTL_ADD, wake_fd_, kWakeEvent, 0, 0, EPOLLIN);
  look_ups_ = std::make_unique<LookUps>(wake_fd_);
  if (options.transport != Transport::kTcp) {
    boot_id_ = read_boot_id();
    if (options.memory.fd >= 0) {
      TANDEM_ASSIGN(tickets_, TicketTable::create());
    } else if (options.transport == Transport::kSharedMemory) {
      return make_error(ErrorKind::kUnavailable,
                        "the KV memory cannot be shared (the kernel refused a memfd); choose --kv-transport auto or tcp");
    }
  }
  TANDEM_ASSIGN(listener_, open_listener(address, "KV transfers", "kv_port"));
  watch(EPOLL_CTL_ADD, listener_, kListenerEvent, 0, 0, EPOLLIN);
  CHECK_EQ(getsockname(listener_, reinterpret_cast<sockaddr*>(&address.storage), &address.length), 0);
  port_ = address.port();
  return {};
}

StreamMessenger::~StreamMessenger() {
  look_ups_.reset();
  stopping_ = true;
  if (listener_ >= 0) ::close(listener_);
  guests_.clear();
  const int64_t deadline_us = clock_.now_us() + kFlushUs;
  while (true) {
    flush_all();
    if (is_flushed() || clock_.now_us() >= deadline_us) break;
    handle_events(kFlushStepUs);
  }
  for (auto& [id, link] : links_) {
    for (const Lent& lent : link->lent) {
      if (!lent.is_over) tickets_->end(lent.ticket);
    }
  }
  links_.clear();
  if (wake_fd_ >= 0) ::close(wake_fd_);
  if (epoll_fd_ >= 0) ::close(epoll_fd_);
}

// True if the peers' kernels have all that was sent, and the peers have read all that was lent.
bool StreamMessenger::is_flushed() const {
  for (const auto& [id, link] : links_) {
    if (link->is_dead() || !link->is_open) continue;
    if (!link->lent.empty()) return false;
    for (const std::unique_ptr<Stream>& stream : link->streams) {
      if (stream->wants_write() || !stream->is_delivered()) return false;
    }
  }
  return true;
}

// --- links ---

StreamMessenger::Link* StreamMessenger::find(ConnectionId id) {
  const auto found = links_.find(id);
  return found == links_.end() ? nullptr : found->second.get();
}

const StreamMessenger::Link* StreamMessenger::find(ConnectionId id) const {
  const auto found = links_.find(id);
  return found == links_.end() ? nullptr : found->second.get();
}

int64_t StreamMessenger::Link::num_unfinished() const {
  int64_t count = std::ssize(waiting) + std::ssize(lent);
  for (const std::unique_ptr<Stream>& stream : streams) count += stream->num_queued();
  return count;
}

void StreamMessenger::watch(int operation, int fd, EventKind kind, uint64_t id, size_t stream, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = (id << 8) | (static_cast<uint64_t>(stream) << 2) | kind;
  CHECK_EQ(epoll_ctl(epoll_fd_, operation, fd, &event), 0);
}

void StreamMessenger::fail(Link& link, Error error) {
  if (!link.failure.has_value()) link.failure = std::move(error);
}

void StreamMessenger::close(ConnectionId id) {
  Link* link = find(id);
  if (link != nullptr) link->closed_by_us = true;
}

std::string StreamMessenger::transport_name(ConnectionId id) const {
  const Link* link = find(id);
  if (link == nullptr || !link->is_open) return "connecting";
  if (link->shares()) return "shared memory";
  return fmt::format("tcp/{} x{}", device_, kStreams);
}

bool StreamMessenger::wants_checksum(ConnectionId id) const {
  const Link* link = find(id);
  return link == nullptr || !link->is_read;
}

// --- sending ---

SendResult StreamMessenger::send(ConnectionId id, std::span<const std::byte> message,
                                 std::span<const std::byte> payload, uint64_t token) {
  const ByteSpan piece = payload;
  return send_pieces(id, message, payload.empty() ? std::span<const ByteSpan>() : std::span(&piece, 1), token);
}

SendResult StreamMessenger::send_pieces(ConnectionId id, std::span<const std::byte> message,
                                        std::span<const ByteSpan> pieces, uint64_t token) {
  CHECK(!message.empty());
  CHECK_LE(std::ssize(message), pieces.empty() ? kMaxMessageBytes : kMaxHeaderBytes);
  CHECK_LE(std::ssize(pieces), kMaxPieces);
  Link* link = find(id);
  if (link == nullptr || link->is_dead()) return SendResult::kClosed;
  if (link->num_unfinished() >= kMaxSendsPerConnection) {
    fail(*link, make_error(ErrorKind::kUnavailable, "{} does not read: {} messages wait for it", link->peer,
                           kMaxSendsPerConnection));
    return SendResult::kClosed;
  }
  if (link->is_open) return enqueue(*link, message, pieces, token);
  link->waiting.push_back({{message.begin(), message.end()}, {pieces.begin(), pieces.end()}, token});
  return pieces.empty() ? SendResult::kSent : SendResult::kPending;
}

std::unique_ptr<OutFrame> StreamMessenger::take_blank() {
  if (blanks_.empty()) return std::make_unique<OutFrame>();
  std::unique_ptr<OutFrame> blank = std::move(blanks_.back());
  blanks_.pop_back();
  blank->head.clear();
  blank->payload.clear();
  blank->payload_bytes = 0;
  blank->mark = PayloadMark::kWhole;
  blank->token = 0;
  blank->wants_sent = false;
  return blank;
}

bool StreamMessenger::is_in_memory(std::span<const ByteSpan> pieces) const {
  const LocalMemory& memory = options_.memory;
  return std::all_of(pieces.begin(), pieces.end(), [&](const ByteSpan piece) {
    return piece.data() >= memory.base && piece.data() + piece.size() <= memory.base + memory.bytes;
  });
}

template <typename T>
void append(std::vector<std::byte>& to, const T& value) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(&value, 1));
  to.insert(to.end(), bytes.begin(), bytes.end());
}

SendResult StreamMessenger::enqueue(Link& link, std::span<const std::byte> message, std::span<const ByteSpan> pieces,
                                    uint64_t token) {
  size_t payload_bytes = 0;
  for (const ByteSpan piece : pieces) payload_bytes += piece.size();
  CHECK_LE(static_cast<int64_t>(payload_bytes), kMaxStreamPayloadBytes);
  std::unique_ptr<OutFrame> frame = take_blank();
  const bool may_lend = payload_bytes > 0 && link.is_read && is_in_memory(pieces);
  const std::optional<Ticket> ticket = may_lend ? tickets_->take() : std::nullopt;
  if (!ticket.has_value()) {
    append(frame->head, make_header(FrameKind::kMessage, message.size(), payload_bytes, 0));
    frame->head.insert(frame->head.end(), message.begin(), message.end());
    frame->payload.assign(pieces.begin(), pieces.end());
    frame->payload_bytes = payload_bytes;
    frame->token = token;
    frame->wants_sent = payload_bytes > 0;
  } else {
    const size_t notes = sizeof(BorrowNote) + pieces.size() * sizeof(BorrowPiece);
    FrameHeader header = make_header(FrameKind::kBorrowed, message.size() + notes, 0, 0);
    header.num_pieces = static_cast<uint32_t>(pieces.size());
    append(frame->head, header);
    frame->head.insert(frame->head.end(), message.begin(), message.end());
    append(frame->head, BorrowNote{ticket->value, ticket->slot});
    for (const ByteSpan piece : pieces) {
      append(frame->head, BorrowPiece{static_cast<uint64_t>(piece.data() - options_.memory.base), piece.size()});
    }
    link.lent.push_back({*ticket, token, false});
  }
  hand_over(link, std::move(frame));
  // While its checksum has just brought it into the cache, and so that the peer need not wait for the last one.
  Stream& stream = *link.streams[link.current];
  if (stream.unwritten_bytes() >= kRunBytes) (void)write_stream(link, stream);  // a failure shows at the next turn
  return payload_bytes > 0 ? SendResult::kPending : SendResult::kSent;
}

void StreamMessenger::hand_over(Link& link, std::unique_ptr<OutFrame> frame) {
  const uint64_t number = link.next_out++;
  link.run_bytes += frame->bytes();
  std::memcpy(frame->head.data() + offsetof(FrameHeader, number), &number, sizeof number);
  link.streams[choose_stream(link)]->add(std::move(frame));
}

// Runs of frames stay on one stream, so that the receiver can deliver what one read brings while it is in its cache.
size_t StreamMessenger::choose_stream(Link& link) {
  const auto unwritten = [&](size_t i) { return link.streams[i]->unwritten_bytes(); };
  if (link.run_bytes < kRunBytes && unwritten(link.current) < 2 * kRunBytes) return link.current;
  size_t emptiest = (link.current + 1) % link.streams.size();
  for (size_t i = 0; i < link.streams.size(); ++i) {
    if (unwritten(i) < unwritten(emptiest)) emptiest = i;
  }
  link.current = emptiest;
  link.run_bytes = 0;
  return emptiest;
}

void StreamMessenger::revoke(ConnectionId id, uint64_t token) {
  Link* link = find(id);
  if (link == nullptr || token == 0) return;
  std::erase_if(link->waiting, [token](const Waiting& waiting) { return waiting.token == token; });
  std::erase(sent_, std::pair(id, token));
  for (Lent& lent : link->lent) {
    if (lent.token != token || lent.is_over) continue;
    tickets_->end(lent.ticket);
    lent.is_over = true;  // stays in its place until the peer has come to it
    return;
  }
  for (const std::unique_ptr<Stream>& stream : link->streams) {
    if (stream->revoke(token)) return;
  }
}

// --- receiving ---

void StreamMessenger::read_stream(Link& link, Stream& stream) {
  Stream* at = &stream;
  for (int turn = 0; turn < kMaxReads && !link.is_dead(); ++turn) {
    const Result<bool> more = read_once(link, *at);
    if (!link.is_open) read_greeting(link);
    if (link.is_open) deliver(link);
    if (!more.ok()) {
      read_last_words(link);
      const char* what = link.is_open ? "lost the connection to" : "cannot connect to";
      return fail(link, make_error(ErrorKind::kUnavailable, "{} {}: {}", what, link.peer, more.error().message));
    }
    Stream* const next = find_stream_in_turn(link);
    if (next != nullptr && next != at) {
      at = next;
    } else if (!*more) {
      break;
    }
  }
}

// The stream whose first frame is the next of the connection, and not whole yet.
Stream* StreamMessenger::find_stream_in_turn(Link& link) {
  if (!link.is_open) return nullptr;
  for (const std::unique_ptr<Stream>& stream : link.streams) {
    const Result<std::optional<FrameHeader>> header = stream->first_header();
    if (header.ok() && header->has_value() && (*header)->number == link.next_in) return stream.get();
  }
  return nullptr;
}

// A payload that is not next stays in the kernel, because it is not known yet where it will go.
bool StreamMessenger::may_read(const Link& link, const Stream& stream) {
  if (!link.is_open || link.shares()) return stream.wants_read();
  const Result<std::optional<FrameHeader>> header = stream.first_header();
  if (!header.ok()) return false;
  return !header->has_value() || (*header)->number <= link.next_in;
}

Result<bool> StreamMessenger::read_once(Link& link, Stream& stream) {
  if (!link.is_open || link.shares()) return stream.read_some();
  const Result<std::optional<FrameHeader>> first = stream.first_header();
  if (!first.ok() || !first->has_value()) return stream.read_some(kAheadBytes);
  const FrameHeader& header = **first;
  if (header.number > link.next_in) return false;
  const size_t ahead = sizeof header + header.body_bytes;
  if (header.payload_bytes > 0 && (stream.is_placing() || stream.unread_bytes() < ahead + header.payload_bytes)) {
    place_.clear();
    const std::span<const std::byte> body = stream.unread().subspan(sizeof header, header.body_bytes);
    if (!stopping_ && !body.empty() && handler_.find_place(link.id, body, header.payload_bytes, place_)) {
      CHECK(!place_.empty());
      return stream.read_payload(header, place_);
    }
    if (stream.is_placing()) return stream.read_payload(header, {});
  }
  return stream.read_some(std::max(kAheadBytes, frame_bytes(header) - std::min(frame_bytes(header), stream.unread_bytes())));
}

// One of the streams has ended; what the peer said before may still lie in the others.
void StreamMessenger::read_last_words(Link& link) {
  int reads = 0;
  bool any = link.is_open;
  while (any && reads < kMaxLastReads && !link.is_dead()) {
    any = false;
    for (size_t i = 0; i < link.streams.size() && !link.is_dead(); ++i) {
      const uint64_t before = link.streams[i]->num_read();
      const Result<bool> more = read_once(link, *link.streams[i]);
      any = any || (more.ok() && (*more || link.streams[i]->num_read() != before));
      ++reads;
      deliver(link);
    }
  }
}

void StreamMessenger::deliver(Link& link) {
  bool any = true;
  while (any) {
    any = false;
    for (size_t i = 0; i < link.streams.size(); ++i) {
      while (!link.is_dead()) {
        const Result<std::optional<FrameHeader>> header = link.streams[i]->next_frame();
        if (!header.ok()) {
          return fail(link, make_error(ErrorKind::kUnavailable, "{}: {}", link.peer, header.error().message));
        }
        if (!header->has_value() || (*header)->number > link.next_in) break;
        if ((*header)->number != link.next_in) {
          return fail(link, make_error(ErrorKind::kUnavailable, "{}: frame {} came in place of {}", link.peer,
                                       (*header)->number, link.next_in));
        }
        ++link.next_in;
        any = true;
        take_frame(link, **header, *link.streams[i]);
        link.streams[i]->consume_frame(**header);
      }
    }
  }
}

void StreamMessenger::take_frame(Link& link, const FrameHeader& header, const Stream& stream) {
  const std::span<const std::byte> bytes = stream.unread().first(stream.buffered_bytes(header));
  const std::span<const std::byte> body = bytes.subspan(sizeof header, header.body_bytes);
  if (header.kind == FrameKind::kRead) {
    uint64_t count = 0;
    std::memcpy(&count, body.data(), sizeof count);
    return take_read(link, count);
  }
  if (header.kind == FrameKind::kBorrowed) return take_borrowed(link, header, body);
  if (header.is_void != 0 || stopping_) return;
  if (header.payload_bytes > 0) {
    moved_bytes_ += header.payload_bytes;
    PayloadMark mark = PayloadMark::kVoid;
    std::memcpy(&mark, bytes.last(sizeof mark).data(), sizeof mark);
    if (mark == PayloadMark::kVoid) return;
    if (mark != PayloadMark::kWhole) {
      return fail(link, make_error(ErrorKind::kUnavailable, "{}: damaged frame: a payload without its mark", link.peer));
    }
  }
  if (body.empty()) {
    return fail(link, make_error(ErrorKind::kUnavailable, "{}: damaged frame: an empty message", link.peer));
  }
  if (!stream.is_placing()) {
    return handler_.on_message(link.id, body, bytes.subspan(sizeof header + header.body_bytes, header.payload_bytes));
  }
  if (stream.is_placed()) handler_.on_placed_message(link.id, body, header.payload_bytes);
}

void StreamMessenger::take_borrowed(Link& link, const FrameHeader& header, std::span<const std::byte> body) {
  ++link.num_borrowed;
  const size_t notes = sizeof(BorrowNote) + header.num_pieces * sizeof(BorrowPiece);
  const std::span<const std::byte> message = body.first(body.size() - notes);
  BorrowNote note;
  std::memcpy(&note, body.data() + message.size(), sizeof note);
  std::vector<BorrowPiece> pieces(header.num_pieces);
  std::memcpy(pieces.data(), body.data() + message.size() + sizeof note, pieces.size() * sizeof(BorrowPiece));
  if (!link.peer_memory.has_value() || note.slot >= static_cast<uint64_t>(kTicketSlots) || message.empty()) {
    return fail(link, make_error(ErrorKind::kUnavailable, "{}: damaged frame: a borrowed payload in slot {}", link.peer,
                                 note.slot));
  }
  const Status found = link.peer_memory->find(pieces, borrowed_pieces_);
  if (!found.ok()) {
    return fail(link, make_error(ErrorKind::kUnavailable, "{}: damaged frame: {}", link.peer, found.error().message));
  }
  const BorrowedPayload payload(borrowed_pieces_, link.peer_memory->ticket_word(static_cast<uint32_t>(note.slot)),
                                note.ticket);
  if (!stopping_ && payload.is_valid()) handler_.on_borrowed_message(link.id, message, payload);
  if (link.num_borrowed - link.num_borrowed_told >= kReadsPerNote) {
    tell_read(link);
    (void)write_stream(link, *link.streams[0]);  // a failure shows again at the next turn
  }
}

void StreamMessenger::tell_read(Link& link) {
  if (link.is_dead()) return;
  std::unique_ptr<OutFrame> frame = take_blank();
  append(frame->head, make_header(FrameKind::kRead, sizeof link.num_borrowed, 0, 0));
  append(frame->head, link.num_borrowed);
  link.num_borrowed_told = link.num_borrowed;
  hand_over(link, std::move(frame));
}

void StreamMessenger::take_read(Link& link, uint64_t count) {
  if (count < link.num_lent_read || count - link.num_lent_read > link.lent.size()) {
    return fail(link, make_error(ErrorKind::kUnavailable, "{}: damaged frame: {} payloads read after {} of {}", link.peer,
                                 count, link.num_lent_read, link.num_lent_read + link.lent.size()));
  }
  for (; link.num_lent_read < count; ++link.num_lent_read) {
    const Lent lent = link.lent.front();
    link.lent.pop_front();
    if (lent.is_over) continue;
    tickets_->end(lent.ticket);
    if (lent.token != 0) sent_.emplace_back(link.id, lent.token);
  }
}

// --- the loop ---

Status StreamMessenger::write_stream(Link& link, Stream& stream) {
  const Status status = stream.write_some(written_);
  for (std::unique_ptr<OutFrame>& frame : written_) {
    if (frame->wants_sent && frame->token != 0) sent_.emplace_back(link.id, frame->token);
    moved_bytes_ += static_cast<int64_t>(frame->payload_bytes);
    if (blanks_.size() < kMaxBlanks) blanks_.push_back(std::move(frame));
  }
  written_.clear();
  return status;
}

void StreamMessenger::flush_link(Link& link) {
  for (size_t i = 0; i < link.streams.size() && !link.is_dead(); ++i) {
    if (!link.streams[i]->wants_write()) continue;
    const Status written = write_stream(link, *link.streams[i]);
    if (written.ok()) continue;
    read_last_words(link);
    const char* what = link.is_open ? "lost the connection to" : "cannot connect to";
    fail(link, make_error(ErrorKind::kUnavailable, "{} {}: {}", what, link.peer, written.error().message));
  }
}

// Writes what can be written and reports what has been; true if something was reported.
bool StreamMessenger::flush_all() {
  for (auto& [id, link] : links_) {
    if (link->is_dead()) continue;
    if (link->num_borrowed != link->num_borrowed_told) tell_read(*link);
    flush_link(*link);
    update_interest(*link);
  }
  const bool any = !sent_.empty();
  while (!sent_.empty()) {  // one by one: the handler may take others back
    const auto [id, token] = sent_.front();
    sent_.pop_front();
    if (!stopping_) handler_.on_sent(id, token);
  }
  return any;
}

void StreamMessenger::update_interest(Link& link) {
  for (size_t i = 0; i < link.streams.size(); ++i) {
    Stream& stream = *link.streams[i];
    const bool reads = !link.is_dead() && may_read(link, stream);
    if (reads && link.is_open) stream.await_whole_frame();
    const uint32_t events = (reads ? static_cast<uint32_t>(EPOLLIN) : 0U) |
                            (stream.wants_write() ? static_cast<uint32_t>(EPOLLOUT) : 0U);
    if (stream.interest == events) continue;
    watch(EPOLL_CTL_MOD, stream.socket(), kStreamEvent, link.id.value, i, events);
    stream.interest = events;
  }
}

// Ends what has failed or was closed by us; true if something was reported.
bool StreamMessenger::sweep() {
  std::vector<std::unique_ptr<Link>> ended;
  for (auto at = links_.begin(); at != links_.end();) {
    if (at->second->is_dead()) {
      ended.push_back(std::move(at->second));
      at = links_.erase(at);
    } else {
      ++at;
    }
  }
  for (std::unique_ptr<Link>& link : ended) finish(std::move(link));
  return !ended.empty();
}

void StreamMessenger::finish(std::unique_ptr<Link> link) {
  std::vector<uint64_t> tokens;
  for (const Lent& lent : link->lent) {
    if (lent.is_over) continue;
    tickets_->end(lent.ticket);
    tokens.push_back(lent.token);
  }
  for (const std::unique_ptr<Stream>& stream : link->streams) {
    for (const std::unique_ptr<OutFrame>& frame : stream->take_queue()) {
      if (frame->wants_sent) tokens.push_back(frame->token);
    }
  }
  for (const Waiting& waiting : link->waiting) {
    if (!waiting.pieces.empty()) tokens.push_back(waiting.token);
  }
  link->streams.clear();  // closes the sockets, which tells the peer
  for (const uint64_t token : tokens) {
    if (token != 0) handler_.on_sent(link->id, token);
  }
  if (!link->closed_by_us) handler_.on_closed(link->id, *link->failure);
}

void StreamMessenger::poll(int64_t timeout_us) {
  open_new();
  bool reported = flush_all();
  end_late();
  reported = sweep() || reported;
  const bool is_greeting = !guests_.empty() || std::any_of(links_.begin(), links_.end(), [](const auto& entry) {
    return !entry.second->is_open;
  });
  if (is_greeting) timeout_us = std::min(timeout_us, kMaxSleepUs);
  // More often follows at once than not, and then sleeping would cost both sides: this one to wake, the other to wake it.
  const bool is_recent = clock_.now_us() - last_event_us_ < (moved_bytes_ < kBulkBytes ? kLookAgainUs : kBulkLookAgainUs);
  const bool sleeps = !reported && !is_recent && timeout_us > 0;
  if (sleeps) moved_bytes_ = 0;
  if (handle_events(sleeps ? timeout_us : 0) == 0) return;
  last_event_us_ = clock_.now_us();
  flush_all();
  sweep();
}

int StreamMessenger::handle_events(int64_t timeout_us) {
  std::array<epoll_event, kMaxEvents> events{};
  const timespec limit{static_cast<time_t>(timeout_us / 1'000'000), static_cast<long>(timeout_us % 1'000'000 * 1000)};
  const int count = epoll_pwait2(epoll_fd_, events.data(), kMaxEvents, &limit, nullptr);
  for (int i = 0; i < count; ++i) {
    const uint64_t data = events[static_cast<size_t>(i)].data.u64;
    const uint64_t id = data >> 8;
    switch (static_cast<EventKind>(data & 3)) {
      case kWakeEvent: {
        eventfd_t ignored = 0;
        eventfd_read(wake_fd_, &ignored);
        wake_pending_.store(false);  // after the read: a wake() in between is served by this return
        break;
      }
      case kListenerEvent:
        if (!stopping_) accept_all();
        break;
      case kGuestEvent:
        if (!stopping_) read_guest(id);
        break;
      case kStreamEvent: {
        Link* link = find(ConnectionId(id));
        const size_t stream = (data >> 2) & 63;
        const uint32_t what = events[static_cast<size_t>(i)].events;
        if (link != nullptr && !link->is_dead() && (what & ~static_cast<uint32_t>(EPOLLOUT)) != 0) {
          read_stream(*link, *link->streams[stream]);
          // What has ended and cannot be read yet would be reported again and again.
          if ((what & (EPOLLERR | EPOLLHUP)) != 0 && !link->is_dead() && !may_read(*link, *link->streams[stream])) {
            read_last_words(*link);
            fail(*link, make_error(ErrorKind::kUnavailable, "lost the connection to {}: a stream has ended", link->peer));
          }
        }
      }
    }
  }
  return count;
}

void StreamMessenger::wake() {
  if (!wake_pending_.exchange(true)) eventfd_write(wake_fd_, 1);
}

Result<std::unique_ptr<Messenger>> make_stream_messenger(const MessengerOptions& options, MessageHandler& handler) {
  std::unique_ptr<StreamMessenger> messenger = std::make_unique<StreamMessenger>(handler);
  TANDEM_TRY(messenger->start(options));
  return std::unique_ptr<Messenger>(std::move(messenger));
}

}  // namespace tandem::comm
