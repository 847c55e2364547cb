#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#include "src/base/clock.h"
#include "src/comm/address.h"
#include "src/comm/messenger.h"
#include "src/comm/shared_region.h"

namespace tandem::comm {
namespace {

constexpr int64_t kMemoryBytes = 4 << 20;

struct Message {
  ConnectionId from;
  std::vector<std::byte> bytes;
  std::vector<std::byte> payload;
};

class Recorder final : public MessageHandler {
 public:
  void on_accept(ConnectionId connection) override { accepted.push_back(connection); }
  void on_message(ConnectionId connection, std::span<const std::byte> message,
                  std::span<const std::byte> payload) override {
    messages.push_back({connection, {message.begin(), message.end()}, {payload.begin(), payload.end()}});
  }
  void on_sent(ConnectionId, uint64_t token) override { sent.push_back(token); }
  void on_closed(ConnectionId connection, const Error& why) override { closed.emplace_back(connection, why); }

  std::vector<ConnectionId> accepted;
  std::vector<Message> messages;
  std::vector<uint64_t> sent;
  std::vector<std::pair<ConnectionId, Error>> closed;
};

std::vector<std::byte> make_bytes(size_t size, int seed) {
  std::vector<std::byte> bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>((i * 31 + static_cast<size_t>(seed)) & 0xff);
  return bytes;
}

// Memory that both messengers of a test lend from.
LocalMemory shared_memory() {
  static const SharedRegion region = SharedRegion::create("messenger-test", kMemoryBytes).value();
  return {region.data(), region.bytes(), region.address().fd};
}

MessengerOptions options_of(Transport transport) {
  MessengerOptions options;
  options.transport = transport;
  options.memory = shared_memory();
  return options;
}

std::string name_of(Transport transport) {
  switch (transport) {
    case Transport::kAuto:
    case Transport::kSharedMemory:
      return "shared memory";
    case Transport::kTcp:
      return "tcp/lo x4";
    case Transport::kUcx:
      return "ucx posix/memory";
    case Transport::kUcxTcp:
      return "ucx tcp/lo";
  }
  return "?";
}

// Two messengers pumped by one thread.
class MessengerTest : public testing::TestWithParam<Transport> {
 protected:
  void SetUp() override {
    server = start(server_events);
    client = start(client_events);
  }
  std::unique_ptr<Messenger> start(Recorder& events, int64_t port = 0) const {
    MessengerOptions options = options_of(GetParam());
    options.listen_port = port;
    Result<std::unique_ptr<Messenger>> messenger = make_messenger(options, events);
    EXPECT_TRUE(messenger.ok()) << messenger.error().message;
    return std::move(messenger).value();
  }
  bool pump_until(const std::function<bool()>& done, int64_t limit_us = 5'000'000) {
    const int64_t end_us = clock.now_us() + limit_us;
    while (!done()) {
      if (clock.now_us() > end_us) return false;
      if (server != nullptr) server->poll(0);
      if (client != nullptr) client->poll(100);
    }
    return true;
  }

  SteadyClock clock;
  Recorder server_events;
  Recorder client_events;
  std::unique_ptr<Messenger> server;
  std::unique_ptr<Messenger> client;
};

TEST_P(MessengerTest, CarriesMessagesAndPayloadsBothWays) {
  const ConnectionId id = client->connect("127.0.0.1", server->port()).value();
  const std::vector<std::byte> hello = make_bytes(40, 1);
  const std::vector<std::byte> long_message = make_bytes(static_cast<size_t>(kMaxMessageBytes), 2);
  const std::vector<std::byte> payload = make_bytes(static_cast<size_t>(kMaxPayloadBytes), 3);
  client->send(id, hello);
  client->send(id, long_message);
  const SendResult result = client->send(id, hello, payload, 77);
  ASSERT_TRUE(pump_until([&] { return server_events.messages.size() == 3; }));
  EXPECT_EQ(server_events.accepted.size(), 1U);
  EXPECT_EQ(server_events.messages[0].bytes, hello);
  EXPECT_TRUE(server_events.messages[0].payload.empty());
  EXPECT_EQ(server_events.messages[1].bytes, long_message);
  EXPECT_EQ(server_events.messages[2].bytes, hello);
  EXPECT_EQ(server_events.messages[2].payload, payload);
  if (result == SendResult::kPending) {
    ASSERT_TRUE(pump_until([&] { return client_events.sent == std::vector<uint64_t>{77}; }));
  }
  server->send(server_events.accepted[0], long_message, {});
  server->send(server_events.accepted[0], hello, payload, 78);
  ASSERT_TRUE(pump_until([&] { return client_events.messages.size() == 2; }));
  EXPECT_EQ(client_events.messages[0].bytes, long_message);
  EXPECT_EQ(client_events.messages[1].payload, payload);
  EXPECT_EQ(client->transport_name(id), name_of(GetParam()));
  EXPECT_EQ(server->transport_name(server_events.accepted[0]), name_of(GetParam()));
}

TEST_P(MessengerTest, KeepsOrderUnderLoad) {
  const ConnectionId id = client->connect("localhost", server->port()).value();
  const std::vector<std::byte> payload = make_bytes(20000, 9);
  constexpr uint32_t kCount = 2000;
  uint64_t pending = 0;
  uint32_t next = 0;
  ASSERT_TRUE(pump_until(
      [&] {
        while (next < kCount && pending < 64 + client_events.sent.size()) {
          std::vector<std::byte> header(8);
          std::memcpy(header.data(), &next, sizeof next);
          if (client->send(id, header, next % 3 == 0 ? std::span<const std::byte>() : payload, next + 1) ==
              SendResult::kPending) {
            ++pending;
          }
          ++next;
        }
        return server_events.messages.size() == kCount && client_events.sent.size() == pending;
      },
      20'000'000));
  for (uint32_t i = 0; i < kCount; ++i) {
    uint32_t got = 0;
    std::memcpy(&got, server_events.messages[i].bytes.data(), sizeof got);
    ASSERT_EQ(got, i);
  }
}

TEST_P(MessengerTest, TellsTheOtherSideOfAClose) {
  const ConnectionId id = client->connect("127.0.0.1", server->port()).value();
  client->send(id, make_bytes(8, 1));
  ASSERT_TRUE(pump_until([&] { return server_events.messages.size() == 1; }));
  server->close(server_events.accepted[0]);
  ASSERT_TRUE(pump_until([&] { return client_events.closed.size() == 1; }));
  EXPECT_EQ(client_events.closed[0].first, id);
  EXPECT_EQ(client_events.closed[0].second.kind, ErrorKind::kUnavailable);
  EXPECT_EQ(client->send(id, make_bytes(8, 1)), SendResult::kClosed);
  EXPECT_TRUE(server_events.closed.empty());
  EXPECT_EQ(server->send(server_events.accepted[0], make_bytes(8, 1)), SendResult::kClosed);
}

TEST_P(MessengerTest, LastWordsArrive) {
  std::vector<std::vector<std::byte>> payloads;
  for (int i = 0; i < 4; ++i) payloads.push_back(make_bytes(50'000, i));
  for (size_t round = 1; round <= 20; ++round) {
    const ConnectionId id = client->connect("127.0.0.1", server->port()).value();
    client->send(id, make_bytes(200, 1));  // long enough for UCX to complete its connection
    const size_t want = 5 * round - 4;
    ASSERT_TRUE(pump_until([&] { return server_events.messages.size() == want; }));
    server->send(server_events.accepted.back(), make_bytes(200, 1));
    ASSERT_TRUE(pump_until([&] { return client_events.messages.size() == round; }));
    for (int i = 0; i < 4; ++i) client->send(id, make_bytes(100, i), payloads[static_cast<size_t>(i)], 1);
    client = start(client_events);  // the former one goes
    ASSERT_TRUE(pump_until([&] { return server_events.closed.size() == round; }));
    EXPECT_EQ(server_events.messages.size(), 5 * round) << server_events.closed.back().second.message;
  }
}

TEST_P(MessengerTest, ReportsAnUnreachablePeer) {
  const int64_t unused_port = start(client_events)->port();  // was free a moment ago
  const ConnectionId id = client->connect("127.0.0.1", unused_port).value();
  const std::vector<std::byte> payload = make_bytes(10, 2);
  client->send(id, make_bytes(8, 1), payload, 5);
  ASSERT_TRUE(pump_until([&] { return client_events.closed.size() == 1; }));
  EXPECT_EQ(client_events.closed[0].first, id);
  EXPECT_NE(client_events.closed[0].second.message.find(std::to_string(unused_port)), std::string::npos)
      << client_events.closed[0].second.message;
  EXPECT_EQ(client_events.sent, std::vector<uint64_t>{5});  // before on_closed the payload is released

  const ConnectionId unknown = client->connect("no-such-host.invalid", 9000).value();
  ASSERT_TRUE(pump_until([&] { return client_events.closed.size() == 2; }, 30'000'000));
  EXPECT_EQ(client_events.closed[1].first, unknown);
  EXPECT_FALSE(client->connect("127.0.0.1", 0).ok());
  EXPECT_FALSE(client->connect("127.0.0.1", 65536).ok());
  EXPECT_FALSE(client->connect("", 9000).ok());
}

TEST_P(MessengerTest, ARestartedPeerOnTheSamePortIsReachable) {
  const int64_t port = server->port();
  for (int round = 0; round < 3; ++round) {
    const ConnectionId id = client->connect("127.0.0.1", port).value();
    client->send(id, make_bytes(8, round));
    const size_t want = static_cast<size_t>(round) + 1;
    ASSERT_TRUE(pump_until([&] { return server_events.messages.size() == want; }));
    server.reset();
    ASSERT_TRUE(pump_until([&] { return client_events.closed.size() == want; }));
    server = start(server_events, port);
    ASSERT_EQ(server->port(), port);
  }
}

TEST_P(MessengerTest, RefusesAPortInUseAndAForeignAddress) {
  MessengerOptions options = options_of(GetParam());
  options.listen_port = server->port();
  Result<std::unique_ptr<Messenger>> second = make_messenger(options, client_events);
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.error().param, "kv_port");
  EXPECT_NE(second.error().message.find(std::to_string(server->port())), std::string::npos) << second.error().message;
  options.listen_host = "192.0.2.7";
  second = make_messenger(options, client_events);
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.error().param, "kv_ip");
}

TEST_P(MessengerTest, StrangersOnThePortAreDropped) {
  const std::vector<std::string> greetings = {"GET / HTTP/1.1\r\nHost: a\r\n\r\n", std::string(20'000, '\xff'),
                                              std::string("TDNP\1\0\0\0\0\0\0\0", 12),          // empty address
                                              std::string("TDNP\1\0\0\0\xff\xff\xff\xff", 12),  // of 4 GiB
                                              std::string("TDNP\2\0\0\0\4\0\0\0abcd", 16)};     // version 2
  for (size_t i = 0; i < greetings.size(); ++i) {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    const SocketAddress address = *parse_address("127.0.0.1", server->port());
    ASSERT_EQ(::connect(fd, address.get(), address.length), 0);
    ASSERT_GT(::send(fd, greetings[i].data(), greetings[i].size(), MSG_NOSIGNAL), 0);
    char byte = 0;
    ssize_t got = -1;
    ASSERT_TRUE(pump_until([&] {
      got = recv(fd, &byte, 1, MSG_DONTWAIT);
      return got >= 0 || (errno != EAGAIN && errno != EWOULDBLOCK);
    })) << i;
    EXPECT_LE(got, 0);  // not one byte of an answer
    ::close(fd);
  }
  EXPECT_TRUE(server_events.messages.empty());
  const ConnectionId id = client->connect("127.0.0.1", server->port()).value();
  client->send(id, make_bytes(8, 1));
  EXPECT_TRUE(pump_until([&] { return server_events.messages.size() == 1; }));
}

int64_t cpu_time_us() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1'000'000 + usage.ru_utime.tv_usec + usage.ru_stime.tv_usec;
}

TEST_P(MessengerTest, SleepsWhenIdleAndWakesOnCommand) {
  const ConnectionId id = client->connect("127.0.0.1", server->port()).value();
  client->send(id, make_bytes(8, 1));
  ASSERT_TRUE(pump_until([&] { return server_events.messages.size() == 1; }));
  const int64_t cpu_before_us = cpu_time_us();
  const int64_t end_us = clock.now_us() + 1'500'000;
  while (clock.now_us() < end_us) client->poll(1'000'000);
  const int64_t cpu_us = cpu_time_us() - cpu_before_us;
  std::printf("idle: %ld us of CPU in 1.5 s\n", static_cast<long>(cpu_us));
  EXPECT_LT(cpu_us, 15'000);

  std::thread waker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    client->wake();
  });
  const int64_t start_us = clock.now_us();
  while (clock.now_us() - start_us < 40'000) client->poll(2'000'000);
  EXPECT_LT(clock.now_us() - start_us, 1'000'000);
  waker.join();
}

INSTANTIATE_TEST_SUITE_P(Transports, MessengerTest,
                         testing::Values(Transport::kSharedMemory, Transport::kTcp, Transport::kUcx, Transport::kUcxTcp),
                         [](const testing::TestParamInfo<Transport>& param) { return transport_option(param.param); });

TEST(Address, ParsesNumbersAndKnowsDevices) {
  EXPECT_EQ(parse_address("127.0.0.1", 80)->to_string(), "127.0.0.1:80");
  EXPECT_EQ(parse_address("localhost", 80)->to_string(), "127.0.0.1:80");
  EXPECT_EQ(parse_address("::1", 80)->to_string(), "[::1]:80");
  EXPECT_FALSE(parse_address("example.invalid", 80).has_value());
  EXPECT_EQ(find_device(*parse_address("127.0.0.1", 1)).value(), "lo");
  EXPECT_EQ(find_device(*parse_address("127.0.0.9", 1)).value(), "lo");
  EXPECT_FALSE(find_device(*parse_address("192.0.2.1", 1)).ok());
  EXPECT_FALSE(find_device(*parse_address("0.0.0.0", 1)).ok());
}

}  // namespace
}  // namespace tandem::comm
