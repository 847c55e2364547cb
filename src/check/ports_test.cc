#include "src/check/ports.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include "src/base/clock.h"
#include "src/check/transport.h"
#include "src/comm/address.h"
#include "src/comm/meeting.h"

namespace tandem::check {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kPatience{5'000};

TEST(Ports, WhoConnectsIsGreetedWithTheToken) {
  const Listeners listeners({{"127.0.0.1", 0}, {"localhost", 0}}, "token");
  ASSERT_EQ(listeners.outcomes().size(), 2U);
  std::vector<HostPort> places;
  for (const ListenOutcome& outcome : listeners.outcomes()) {
    ASSERT_EQ(outcome.state, PortState::kFree);
    EXPECT_EQ(outcome.address, "127.0.0.1");
    places.push_back({"127.0.0.1", outcome.port});
  }
  for (const ConnectOutcome& outcome : connect_all(places, "token", kPatience))
    EXPECT_EQ(outcome.reach, Reach::kReached);
  for (const ConnectOutcome& outcome : connect_all(places, "", kPatience)) EXPECT_EQ(outcome.reach, Reach::kReached);
  for (const ConnectOutcome& outcome : connect_all(places, "other", kPatience)) EXPECT_EQ(outcome.reach, Reach::kOther);
}

TEST(Ports, APortIsFreeAgainAfterwards) {
  int64_t port = 0;
  for (int round = 0; round < 3; ++round) {
    const Listeners listeners({{"127.0.0.1", port}}, "token");
    ASSERT_EQ(listeners.outcomes()[0].state, PortState::kFree) << listeners.outcomes()[0].text;
    port = listeners.outcomes()[0].port;
    EXPECT_EQ(connect_all({{"127.0.0.1", port}}, "token", kPatience)[0].reach, Reach::kReached);
  }
  // Nobody holds it now.
  EXPECT_EQ(connect_all({{"127.0.0.1", port}}, "token", kPatience)[0].reach, Reach::kRefused);
}

TEST(Ports, TellsWhyOneCannotBeTaken) {
  const Listeners first({{"127.0.0.1", 0}}, "a");
  const Listeners second({{"127.0.0.1", first.outcomes()[0].port}, {"192.0.2.1", 0}, {"no-such-host.invalid", 0}}, "b");
  EXPECT_EQ(second.outcomes()[0].state, PortState::kTaken);
  EXPECT_EQ(second.outcomes()[1].state, PortState::kNotHere);
  EXPECT_EQ(second.outcomes()[2].state, PortState::kUnknownName);
  EXPECT_EQ(connect_all({{"no-such-host.invalid", 1}}, "b", kPatience)[0].reach, Reach::kUnknownName);
}

TEST(Ports, ASilentListenerIsNotTheChecksAndCostsOneTimeOut) {
  const comm::SocketAddress any = *comm::parse_address("127.0.0.1", 0);
  const Result<int> fd = comm::open_listener(any, "a test", "port");
  ASSERT_TRUE(fd.ok());
  comm::SocketAddress own;
  own.length = sizeof own.storage;
  ASSERT_EQ(getsockname(*fd, reinterpret_cast<sockaddr*>(&own.storage), &own.length), 0);
  const SteadyClock clock;
  const int64_t start_us = clock.now_us();
  EXPECT_EQ(connect_all({{"127.0.0.1", own.port()}}, "token", milliseconds(100))[0].reach, Reach::kOther);
  EXPECT_GE(clock.now_us() - start_us, 100'000);
  close(*fd);
}

TEST(Transport, IsMeasuredToAnEcho) {
  const Result<std::unique_ptr<TransportEcho>> echo = TransportEcho::start("127.0.0.1", 0);
  ASSERT_TRUE(echo.ok()) << echo.error().message;
  for (int round = 0; round < 2; ++round) {  // an echo takes one measurement after the other
    const Result<TransportReading> reading = measure_transport("127.0.0.1", "127.0.0.1", (*echo)->port());
    ASSERT_TRUE(reading.ok()) << reading.error().message;
    EXPECT_EQ(reading->transport, "shared memory");
    EXPECT_GT(reading->bytes, 0);
    EXPECT_LE(reading->bytes, kMostTransportBytes);
    EXPECT_GT(reading->round_trip_us, 0);
  }
}

TEST(Transport, SomethingElseAtThePortIsAnError) {
  const Listeners listeners({{"127.0.0.1", 0}}, "this is not the other side of a transport");
  EXPECT_FALSE(measure_transport("127.0.0.1", "127.0.0.1", listeners.outcomes()[0].port).ok());
}

}  // namespace
}  // namespace tandem::check
