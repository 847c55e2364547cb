// What only the messenger over streams and shared memory can do: lend payloads, take them back, and refuse strangers that
// speak its own language.
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "src/base/clock.h"
#include "src/comm/address.h"
#include "src/comm/frame.h"
#include "src/comm/messenger.h"
#include "src/comm/shared_region.h"
#include "src/comm/tickets.h"

namespace tandem::comm {
namespace {

constexpr int64_t kMemoryBytes = 64 << 20;
constexpr size_t kPayload = 60'000;

class Recorder final : public MessageHandler {
 public:
  struct Message {
    std::vector<std::byte> bytes, payload;
    bool borrowed = false;
    bool placed = false;
  };
  void on_accept(ConnectionId connection) override { accepted.push_back(connection); }
  void on_message(ConnectionId, std::span<const std::byte> message, std::span<const std::byte> payload) override {
    messages.push_back({{message.begin(), message.end()}, {payload.begin(), payload.end()}, false});
  }
  void on_borrowed_message(ConnectionId, std::span<const std::byte> message, const BorrowedPayload& payload) override {
    Message copy{{message.begin(), message.end()}, {}, true};
    for (const ByteSpan piece : payload.pieces()) copy.payload.insert(copy.payload.end(), piece.begin(), piece.end());
    if (during_copy) during_copy();
    if (payload.is_valid()) messages.push_back(std::move(copy));
  }
  bool find_place(ConnectionId, std::span<const std::byte>, int64_t payload_bytes,
                  std::vector<MutableByteSpan>& pieces) override {
    if (place.empty()) return false;
    ++num_asked;
    pieces = {place.subspan(100, 1000), place.first(100), place.subspan(1100, static_cast<size_t>(payload_bytes) - 1100)};
    return true;
  }
  void on_placed_message(ConnectionId, std::span<const std::byte> message, int64_t payload_bytes) override {
    Message copy{{message.begin(), message.end()}, {}, false, true};
    copy.payload.assign(place.begin(), place.begin() + payload_bytes);
    messages.push_back(std::move(copy));
  }
  void on_sent(ConnectionId, uint64_t token) override { sent.push_back(token); }
  void on_closed(ConnectionId, const Error& why) override { closed.push_back(why); }

  std::vector<ConnectionId> accepted;
  std::vector<Message> messages;
  std::vector<uint64_t> sent;
  std::vector<Error> closed;
  std::function<void()> during_copy;
  MutableByteSpan place;  // of payloads; empty: they are shown
  int num_asked = 0;
};

std::vector<std::byte> text(const char* words) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(words, std::strlen(words)));
  return {bytes.begin(), bytes.end()};
}

class StreamMessengerTest : public testing::TestWithParam<Transport> {
 protected:
  StreamMessengerTest() : memory(SharedRegion::create("test", kMemoryBytes).value()) {
    server = start(server_events, GetParam(), true);
    client = start(client_events, GetParam(), true);
  }
  std::unique_ptr<Messenger> start(Recorder& events, Transport transport, bool shareable) {
    MessengerOptions options;
    options.transport = transport;
    if (shareable) options.memory = {memory.data(), memory.bytes(), memory.address().fd};
    return make_messenger(options, events).value();
  }
  bool pump_until(const std::function<bool()>& done, int64_t limit_us = 5'000'000) {
    const int64_t end_us = clock.now_us() + limit_us;
    while (!done()) {
      if (clock.now_us() > end_us) return false;
      server->poll(0);
      client->poll(100);
    }
    return true;
  }
  ConnectionId connected() {
    const ConnectionId id = client->connect("127.0.0.1", server->port()).value();
    client->send(id, text("hello"));
    EXPECT_TRUE(pump_until([&] { return server_events.messages.size() == 1; }));
    server_events.messages.clear();
    return id;
  }
  std::span<std::byte> piece(size_t index) { return memory.span().subspan(index * kPayload, kPayload); }
  void fill(size_t index, int value) { std::memset(piece(index).data(), value, kPayload); }
  static bool holds(const std::vector<std::byte>& payload, int value) {
    return payload.size() == kPayload &&
           std::all_of(payload.begin(), payload.end(), [value](std::byte b) { return b == std::byte(value); });
  }

  SteadyClock clock;
  SharedRegion memory;
  Recorder server_events;
  Recorder client_events;
  std::unique_ptr<Messenger> server;
  std::unique_ptr<Messenger> client;
};

TEST_P(StreamMessengerTest, SendsPiecesFromWhereTheyLie) {
  const ConnectionId id = connected();
  ASSERT_TRUE(client->takes_pieces(id));
  fill(3, 3);
  fill(1, 1);
  const ByteSpan pieces[] = {piece(3).first(1000), piece(1).first(2000), piece(3).subspan(1000, 57'000)};
  ASSERT_EQ(client->send_pieces(id, text("parts"), pieces, 9), SendResult::kPending);
  ASSERT_TRUE(pump_until([&] { return client_events.sent == std::vector<uint64_t>{9}; }));
  ASSERT_TRUE(pump_until([&] { return server_events.messages.size() == 1; }));
  const Recorder::Message& message = server_events.messages[0];
  EXPECT_EQ(message.bytes, text("parts"));
  EXPECT_EQ(message.borrowed, GetParam() == Transport::kSharedMemory);
  ASSERT_EQ(message.payload.size(), kPayload);
  for (size_t i = 0; i < kPayload; ++i) {
    ASSERT_EQ(message.payload[i], std::byte(i >= 1000 && i < 3000 ? 1 : 3)) << i;
  }
  EXPECT_EQ(client->wants_checksum(id), GetParam() == Transport::kTcp);
}

// The receiver does not read for a while; the sender takes everything back that has not gone, writes other bytes at once,
// and goes on. Nobody may ever see those bytes.
TEST_P(StreamMessengerTest, WhatIsTakenBackIsNeverSeen) {
  const ConnectionId id = connected();
  constexpr size_t kCount = 1000;
  for (size_t i = 0; i < kCount; ++i) {
    fill(i, static_cast<int>(1 + i % 100));
    const ByteSpan whole = piece(i);
    const ByteSpan number = std::as_bytes(std::span(&i, 1));
    ASSERT_EQ(client->send_pieces(id, number, std::span(&whole, 1), i + 1), SendResult::kPending);
  }
  for (int i = 0; i < 50; ++i) client->poll(0);  // fills what the kernel holds, and ends in the middle of a payload
  const std::vector<uint64_t> sent = client_events.sent;
  EXPECT_LT(sent.size(), kCount);
  for (size_t i = 0; i < kCount; ++i) {
    client->revoke(id, i + 1);
    fill(i, 200);
  }
  client->send(id, text("after"));
  ASSERT_TRUE(pump_until([&] { return !server_events.messages.empty() && server_events.messages.back().payload.empty(); }));
  EXPECT_EQ(client_events.sent, sent);  // of what was taken back nothing is reported
  EXPECT_EQ(server_events.messages.back().bytes, text("after"));
  server_events.messages.pop_back();
  EXPECT_LT(server_events.messages.size(), kCount);
  if (GetParam() == Transport::kTcp) {
    EXPECT_GE(server_events.messages.size(), sent.size());
  }
  for (const Recorder::Message& message : server_events.messages) {  // gaps may be anywhere: streams differ
    size_t i = 0;
    std::memcpy(&i, message.bytes.data(), sizeof i);
    ASSERT_TRUE(holds(message.payload, static_cast<int>(1 + i % 100))) << i;
  }
  // The connection is as good as new.
  fill(0, 7);
  const ByteSpan whole = piece(0);
  client->send_pieces(id, text("again"), std::span(&whole, 1), 5000);
  const size_t before = server_events.messages.size();
  ASSERT_TRUE(pump_until([&] { return server_events.messages.size() == before + 1; }));
  EXPECT_TRUE(holds(server_events.messages.back().payload, 7));
  ASSERT_TRUE(pump_until([&] { return client_events.sent.back() == 5000; }));
}

TEST_P(StreamMessengerTest, APayloadTakenBackDuringTheCopyDoesNotCount) {
  if (GetParam() != Transport::kSharedMemory) GTEST_SKIP() << "only a borrowed payload is copied by the handler";
  const ConnectionId id = connected();
  const ByteSpan whole = piece(0);
  server_events.during_copy = [&] {
    client->revoke(id, 5);
    fill(0, 200);
  };
  client->send_pieces(id, text("data"), std::span(&whole, 1), 5);
  client->send(id, text("after"));
  ASSERT_TRUE(pump_until([&] { return !server_events.messages.empty(); }));
  EXPECT_EQ(server_events.messages[0].bytes, text("after"));
  EXPECT_TRUE(client_events.sent.empty());
}

// Payloads of all sizes go to the place that the handler names, or are shown when all of them came with the header.
TEST_P(StreamMessengerTest, PayloadsAreReadToTheirPlace) {
  if (GetParam() != Transport::kTcp) GTEST_SKIP() << "over shared memory the handler copies";
  const ConnectionId id = connected();
  std::vector<std::byte> target(static_cast<size_t>(client->max_payload_bytes()));
  server_events.place = target;
  std::mt19937 random(5);
  int num_placed = 0;
  for (int round = 0; round < 300; ++round) {
    const size_t size = round == 0 ? target.size() : 1101 + random() % (target.size() - 1101);
    std::vector<std::byte> source(size);
    for (std::byte& byte : source) byte = static_cast<std::byte>(random());
    const ByteSpan whole = source;
    server_events.messages.clear();
    client->send_pieces(id, text("data"), std::span(&whole, 1), 9);
    client->send(id, text("after"));
    ASSERT_TRUE(pump_until([&] { return server_events.messages.size() == 2; }));
    const Recorder::Message& message = server_events.messages[0];
    if (message.placed) {
      ++num_placed;
      std::vector<std::byte> moved(source.begin() + 1000, source.begin() + 1100);
      moved.insert(moved.end(), source.begin(), source.begin() + 1000);
      moved.insert(moved.end(), source.begin() + 1100, source.end());
      source = std::move(moved);
    }
    ASSERT_TRUE(message.payload == source) << size;
    ASSERT_EQ(server_events.messages[1].bytes, text("after"));
  }
  EXPECT_GT(num_placed, 250);
}

// In the middle of a payload its place is given up: from then on not one byte is written there, nobody gets the message,
// and what follows is as good as ever.
TEST_P(StreamMessengerTest, APlaceThatIsGivenUpIsNotWritten) {
  if (GetParam() != Transport::kTcp) GTEST_SKIP() << "over shared memory the handler copies";
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const SocketAddress address = *parse_address("127.0.0.1", server->port());
  ASSERT_EQ(::connect(fd, address.get(), address.length), 0);
  Greeting greeting;
  greeting.transport = Transport::kTcp;
  ASSERT_EQ(::send(fd, &greeting, sizeof greeting, 0), static_cast<ssize_t>(sizeof greeting));
  ASSERT_TRUE(pump_until([&] { return server_events.accepted.size() == 1; }));
  greeting.kind = GreetingKind::kMapped;
  ASSERT_EQ(::send(fd, &greeting, sizeof greeting, 0), static_cast<ssize_t>(sizeof greeting));

  constexpr size_t kBytes = 200'000;
  std::vector<std::byte> target(kBytes, std::byte{1});
  server_events.place = target;
  std::vector<std::byte> bytes;
  const auto add = [&](uint64_t number, size_t payload_bytes) {
    const FrameHeader header = make_header(FrameKind::kMessage, 4, payload_bytes, number);
    const std::span<const std::byte> head = std::as_bytes(std::span(&header, 1));
    bytes.insert(bytes.end(), head.begin(), head.end());
    bytes.resize(bytes.size() + 4 + payload_bytes, std::byte{7});
    const PayloadMark mark = PayloadMark::kWhole;
    const std::span<const std::byte> end = std::as_bytes(std::span(&mark, 1));
    if (payload_bytes > 0) bytes.insert(bytes.end(), end.begin(), end.end());
  };
  add(1, 0);
  ASSERT_EQ(::send(fd, bytes.data(), bytes.size(), 0), std::ssize(bytes));
  ASSERT_TRUE(pump_until([&] { return server_events.messages.size() == 1; }));
  server_events.messages.clear();
  bytes.clear();
  add(2, kBytes);
  add(3, 0);
  add(4, kBytes);
  ASSERT_EQ(::send(fd, bytes.data(), kBytes / 2, 0), static_cast<ssize_t>(kBytes / 2));
  ASSERT_TRUE(pump_until([&] { return target[kBytes / 4] == std::byte{7}; }));
  EXPECT_TRUE(server_events.messages.empty());
  EXPECT_EQ(target.back(), std::byte{1});  // not sent yet

  server_events.place = {};
  std::fill(target.begin(), target.end(), std::byte{2});  // its next owner writes at once
  const size_t left = bytes.size() - kBytes / 2;
  std::thread rest([&] { EXPECT_EQ(::send(fd, bytes.data() + kBytes / 2, left, 0), static_cast<ssize_t>(left)); });
  EXPECT_TRUE(pump_until([&] { return server_events.messages.size() == 2; }));
  rest.join();
  EXPECT_TRUE(std::all_of(target.begin(), target.end(), [](std::byte b) { return b == std::byte{2}; }));
  ASSERT_EQ(server_events.messages.size(), 2U);
  EXPECT_TRUE(server_events.messages[0].payload.empty());
  EXPECT_EQ(server_events.messages[1].payload, std::vector<std::byte>(kBytes, std::byte{7}));
  ::close(fd);
}

// Closing gives all payloads back, although the peer has not read any.
TEST_P(StreamMessengerTest, ACloseGivesPayloadsBackAtOnce) {
  const ConnectionId id = connected();
  for (size_t i = 0; i < 500; ++i) {
    const ByteSpan whole = piece(i);
    client->send_pieces(id, text("data"), std::span(&whole, 1), i + 1);
  }
  client->close(id);
  client->revoke(id, 500);
  client->poll(0);
  EXPECT_EQ(client_events.sent.size(), 499U);
  for (size_t i = 0; i < 500; ++i) fill(i, 200);
  ASSERT_TRUE(pump_until([&] { return server_events.closed.size() == 1; }));
  for (const Recorder::Message& message : server_events.messages) EXPECT_FALSE(holds(message.payload, 200));
}

TEST_P(StreamMessengerTest, WithoutSharedMemoryTcpIsTakenOrThePeerRefused) {
  Recorder events;
  const std::unique_ptr<Messenger> plain = start(events, Transport::kAuto, false);
  const ConnectionId id = client->connect("127.0.0.1", plain->port()).value();
  client->send(id, text("hello"));
  const auto settled = [&] {
    plain->poll(0);
    return events.messages.size() == 1 || client_events.closed.size() == 1;
  };
  ASSERT_TRUE(pump_until(settled));
  if (GetParam() == Transport::kSharedMemory) {
    ASSERT_EQ(client_events.closed.size(), 1U);
    EXPECT_NE(client_events.closed[0].message.find("no shared memory with"), std::string::npos)
        << client_events.closed[0].message;
    EXPECT_TRUE(events.messages.empty());
  } else {
    EXPECT_EQ(client->transport_name(id), "tcp/lo x4");
    EXPECT_TRUE(client_events.closed.empty());
  }
}

TEST_P(StreamMessengerTest, ConnectionsAndGuestsAreLimited) {
  std::vector<int> silent;
  const SocketAddress address = *parse_address("127.0.0.1", server->port());
  for (int i = 0; i < 70; ++i) {  // strangers that never say what they want
    silent.push_back(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(::connect(silent.back(), address.get(), address.length), 0);
    server->poll(0);
  }
  server->poll(0);
  int64_t refused = 0;
  char byte = 0;
  for (const int fd : silent) refused += recv(fd, &byte, 1, MSG_DONTWAIT) == 0 ? 1 : 0;
  EXPECT_EQ(refused, 70 - 64);
  for (const int fd : silent) ::close(fd);
  connected();
  int64_t opened = 1;
  while (client->connect("127.0.0.1", server->port()).ok()) ++opened;
  EXPECT_EQ(opened, kMaxConnections);
  const Result<ConnectionId> more = client->connect("127.0.0.1", server->port());
  EXPECT_EQ(more.error().kind, ErrorKind::kResourceExhausted);
}

// Whoever speaks the protocol up to a point and then stops, dies or talks nonsense costs his own connection only.
TEST_P(StreamMessengerTest, AnUnfinishedOrDamagedFrameIsNeverDelivered) {
  if (GetParam() == Transport::kSharedMemory) GTEST_SKIP() << "it refuses whoever shares nothing, before any frame";
  connected();
  enum class How { kHalfPayload, kHalfHeader, kBadMagic, kBadNumber, kHugePayload, kUnlentSlot, kWrongMark };
  for (const How how : {How::kHalfPayload, How::kHalfHeader, How::kBadMagic, How::kBadNumber, How::kHugePayload,
                        How::kUnlentSlot, How::kWrongMark}) {
    SCOPED_TRACE(static_cast<int>(how));
    server_events.closed.clear();
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const SocketAddress address = *parse_address("127.0.0.1", server->port());
    ASSERT_EQ(::connect(fd, address.get(), address.length), 0);
    Greeting greeting;
    greeting.transport = Transport::kTcp;
    ASSERT_EQ(::send(fd, &greeting, sizeof greeting, 0), static_cast<ssize_t>(sizeof greeting));
    const size_t accepted = server_events.accepted.size();
    ASSERT_TRUE(pump_until([&] { return server_events.accepted.size() == accepted + 1; }));
    greeting.kind = GreetingKind::kMapped;
    ASSERT_EQ(::send(fd, &greeting, sizeof greeting, 0), static_cast<ssize_t>(sizeof greeting));
    FrameHeader header = make_header(FrameKind::kMessage, 4, 1000, 1);
    if (how == How::kBadMagic) header.magic = 1;
    if (how == How::kBadNumber) header.number = 0;
    if (how == How::kHugePayload) header.payload_bytes = 1 << 30;
    if (how == How::kUnlentSlot) {
      header = make_header(FrameKind::kBorrowed, 4 + sizeof(BorrowNote) + sizeof(BorrowPiece), 0, 1);
      header.num_pieces = 1;
    }
    std::vector<char> bytes(sizeof header + 4 + 1004, 'x');
    std::memcpy(bytes.data(), &header, sizeof header);
    const size_t length = how == How::kHalfPayload ? 500 : how == How::kHalfHeader ? 10 : bytes.size();
    ASSERT_EQ(::send(fd, bytes.data(), length, 0), static_cast<ssize_t>(length));
    if (how == How::kHalfPayload || how == How::kHalfHeader) ::shutdown(fd, SHUT_WR);
    ASSERT_TRUE(pump_until([&] { return server_events.closed.size() == 1; }));
    EXPECT_TRUE(server_events.messages.empty());
    ::close(fd);
  }
  connected();  // others are as well as before
}

INSTANTIATE_TEST_SUITE_P(Transports, StreamMessengerTest, testing::Values(Transport::kSharedMemory, Transport::kTcp),
                         [](const auto& param) { return transport_option(param.param); });

TEST(Tickets, AreSeenToEnd) {
  TicketTable table = TicketTable::create().value();
  const SharedRegion seen = SharedRegion::open(table.address(), SharedRegion::Access::kRead).value();
  const Ticket first = *table.take();
  EXPECT_EQ(ticket_word(seen.data(), first.slot)->load(), first.value);
  table.end(first);
  EXPECT_NE(ticket_word(seen.data(), first.slot)->load(), first.value);
  const Ticket second = *table.take();
  EXPECT_EQ(second.slot, first.slot);
  EXPECT_NE(second.value, first.value);
  for (int64_t i = 1; i < kTicketSlots; ++i) EXPECT_TRUE(table.take().has_value());
  EXPECT_FALSE(table.take().has_value());
  EXPECT_EQ(table.num_taken(), kTicketSlots);
}

}  // namespace
}  // namespace tandem::comm
