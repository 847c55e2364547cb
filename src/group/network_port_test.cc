#include "src/group/network_port.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <random>
#include <thread>

#include "src/base/clock.h"
#include "src/group/epoch_memory.h"
#include "src/group/network_fabric.h"

namespace tandem::group {
namespace {

using testing::HasSubstr;

constexpr int64_t kWindowBytes = 4 * 1024 * 1024;

// One rank of a group of two whose other rank is on another node; both live in this process.
struct Side {
  explicit Side(int32_t own, int64_t rank_timeout_us = 10'000'000) : rank(own), timeout_us(rank_timeout_us) {
    bell_region = comm::SharedRegion::create("bell", comm::Bell::kBytes).value();
    memory = EpochMemory::make(RankId(rank), 2, kWindowBytes, bell_region).value();
    memory->stand_in(RankId(1 - rank));
    port = NetworkPort::open({.host = "127.0.0.1",
                              .rank = RankId(rank),
                              .size = 2,
                              .region = memory->region(),
                              .window = MappedFabric::window_in(memory->region(), 2, kWindowBytes),
                              .bell = bell_region.data(),
                              .rank_timeout_us = timeout_us,
                              .on_outcome = [this] { comm::Bell(bell_region.data()).ring(); }})
               .value();
  }
  Status connect(const std::string& address) {
    std::byte* const region = memory->ranks()[static_cast<size_t>(1 - rank)].region;
    return port->connect({{RankId(1 - rank), address, &MappedFabric::pulse_in(region)}});
  }
  NetworkPort::Outcome wait_for_outcome() {
    comm::Bell bell(bell_region.data());
    while (true) {
      const uint32_t rung = bell.count();
      if (const std::optional<NetworkPort::Outcome> outcome = port->outcome()) return *outcome;
      bell.wait(rung, 1'000'000);
    }
  }
  void make_fabric() {
    fabric = std::make_unique<NetworkFabric>(RankId(rank), Epoch(1), memory->ranks(),
                                             std::vector<bool>{rank != 0, rank != 1}, kWindowBytes,
                                             FabricLimits{.rank_timeout_us = timeout_us}, clock, *port);
  }

  int32_t rank;
  int64_t timeout_us;
  SteadyClock clock;
  comm::SharedRegion bell_region;
  std::unique_ptr<EpochMemory> memory;
  std::unique_ptr<NetworkPort> port;
  std::unique_ptr<NetworkFabric> fabric;
};

TEST(NetworkPort, BytesAreThereBeforeTheirSignal) {
  Side zero(0);
  Side one(1);
  ASSERT_TRUE(zero.connect(one.port->address()).ok());
  ASSERT_TRUE(one.connect(zero.port->address()).ok());
  for (Side* side : {&zero, &one}) {
    const NetworkPort::Outcome outcome = side->wait_for_outcome();
    ASSERT_FALSE(outcome.error.has_value()) << outcome.error->message;
    side->make_fabric();
  }
  EXPECT_EQ(zero.fabric->direct(RankId(1)), nullptr);
  EXPECT_EQ(zero.fabric->direct(RankId(0)), zero.fabric->window().data());
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  // Both send blocks of all sizes to places of all alignments, in two halves of the window in turn; often more than the
  // sockets take at once.
  constexpr size_t kBlocks = 8;
  constexpr size_t kPlaceBytes = kWindowBytes / 2 / kBlocks;
  const auto body = [seed](Side& side) {
    Fabric& fabric = *side.fabric;
    const RankId other(1 - side.rank);
    std::mt19937_64 mine(seed + static_cast<uint64_t>(side.rank));
    std::mt19937_64 theirs(seed + static_cast<uint64_t>(other.value));
    struct Block {
      size_t offset;
      std::vector<std::byte> data;
    };
    const auto draw = [](std::mt19937_64& random, uint64_t round) {
      std::vector<Block> blocks;
      for (size_t i = 0; i < kBlocks; ++i) {
        const size_t bytes = 1 + random() % (random() % 2 == 0 ? 500 : kPlaceBytes / 2);
        blocks.push_back({(round % 2 * kBlocks + i) * kPlaceBytes + random() % (kPlaceBytes / 2), {}});
        for (size_t at = 0; at < bytes; ++at) blocks.back().data.push_back(static_cast<std::byte>(random()));
      }
      return blocks;
    };
    for (uint64_t round = 1; round <= 60; ++round) {
      const std::vector<Block> sent = draw(mine, round);
      for (const Block& block : sent) fabric.put(other, static_cast<int64_t>(block.offset), block.data);
      fabric.signal(other, Channel::kDispatch, round);
      ASSERT_TRUE(fabric.flush().ok());
      ASSERT_TRUE(fabric.wait(other, Channel::kDispatch, round).ok());
      for (const Block& block : draw(theirs, round)) {
        ASSERT_EQ(std::memcmp(fabric.window().data() + block.offset, block.data.data(), block.data.size()), 0) << round;
      }
    }
  };
  std::thread thread([&] { body(one); });
  body(zero);
  thread.join();
}

TEST(NetworkPort, SmallPutsTravelTogetherAndInOrder) {
  Side zero(0);
  Side one(1);
  ASSERT_TRUE(zero.connect(one.port->address()).ok());
  ASSERT_TRUE(one.connect(zero.port->address()).ok());
  for (Side* side : {&zero, &one}) {
    ASSERT_FALSE(side->wait_for_outcome().error.has_value());
    side->make_fabric();
  }
  constexpr size_t kPuts = 1000;  // more than one message takes
  constexpr size_t kBytes = 100;
  std::vector<std::byte> data(kPuts * kBytes);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i * 7 + i / 251);
  // To places in another order, the last place twice: the later put stays.
  const auto place = [](size_t i) { return (i * 37 % kPuts) * 2 * kBytes; };
  const std::vector<std::byte> first(kBytes, std::byte{99});
  zero.fabric->put(RankId(1), static_cast<int64_t>(place(kPuts - 1)), first);
  for (size_t i = 0; i < kPuts; ++i) {
    zero.fabric->put(RankId(1), static_cast<int64_t>(place(i)), std::span(data).subspan(i * kBytes, kBytes));
  }
  ASSERT_TRUE(zero.fabric->flush().ok());  // without a signal they leave, too …
  std::fill(data.begin(), data.begin() + kBytes, std::byte{1});
  zero.fabric->put(RankId(1), kWindowBytes - 1, std::span(data).first(1));
  zero.fabric->signal(RankId(1), Channel::kCombine, 1);  // … and before it
  ASSERT_TRUE(one.fabric->wait(RankId(0), Channel::kCombine, 1).ok());
  const std::span<const std::byte> window = one.fabric->window();
  EXPECT_EQ(window[kWindowBytes - 1], std::byte{1});
  for (size_t i = 1; i < kPuts; ++i) {
    ASSERT_EQ(std::memcmp(window.data() + place(i), data.data() + i * kBytes, kBytes), 0) << i;
    ASSERT_EQ(window[place(i) + kBytes], std::byte{0}) << i;
  }
  EXPECT_EQ(window[place(0)], std::byte{0});  // as it was when flush() returned
}

TEST(NetworkPort, Throughput) {
  Side zero(0);
  Side one(1);
  ASSERT_TRUE(zero.connect(one.port->address()).ok());
  ASSERT_TRUE(one.connect(zero.port->address()).ok());
  for (Side* side : {&zero, &one}) {
    ASSERT_FALSE(side->wait_for_outcome().error.has_value());
    side->make_fabric();
  }
  const std::vector<std::byte> data(2 * 1024 * 1024, std::byte{7});
  for (const size_t bytes : {size_t{8}, size_t{8192}, size_t{65536}, data.size()}) {
    constexpr uint64_t kRounds = 200;
    const uint64_t base = zero.fabric->signalled(RankId(1), Channel::kCombine);
    std::thread echo([&] {
      for (uint64_t i = 1; i <= kRounds; ++i) {
        ASSERT_TRUE(one.fabric->wait(RankId(0), Channel::kCombine, base + i).ok());
        one.fabric->signal(RankId(0), Channel::kCombine, base + i);
      }
    });
    const int64_t begin_us = zero.clock.now_us();
    for (uint64_t i = 1; i <= kRounds; ++i) {
      zero.fabric->put(RankId(1), 0, std::span(data).first(bytes));
      zero.fabric->signal(RankId(1), Channel::kCombine, base + i);
      ASSERT_TRUE(zero.fabric->wait(RankId(1), Channel::kCombine, base + i).ok());
    }
    const double us = static_cast<double>(zero.clock.now_us() - begin_us) / kRounds;
    echo.join();
    std::printf("put of %zu bytes, signal and answer over TCP: %.1f us, %.2f GB/s\n", bytes, us,
                static_cast<double>(bytes) / us * 1e-3);
  }
}

TEST(NetworkPort, WhatHasAnotherStampIsDropped) {
  Side zero(0, 500'000);
  Side one(1, 500'000);
  // Rank 0 has the address of rank 1, but of another epoch.
  std::string stale = one.port->address();
  stale.back() = stale.back() == '0' ? '1' : '0';
  ASSERT_TRUE(zero.connect(stale).ok());
  ASSERT_TRUE(one.connect(zero.port->address()).ok());
  const NetworkPort::Outcome outcome = one.wait_for_outcome();
  ASSERT_TRUE(outcome.error.has_value());
  EXPECT_THAT(outcome.error->message, HasSubstr("nothing came from rank 0"));
  EXPECT_EQ(outcome.suspect, 0);
  EXPECT_FALSE(zero.wait_for_outcome().error.has_value());
}

TEST(NetworkPort, NamesAPeerThatIsNotThere) {
  std::string gone;
  {
    Side one(1);
    gone = one.port->address();
  }
  Side zero(0, 500'000);
  const int64_t begin_us = zero.clock.now_us();
  ASSERT_TRUE(zero.connect(gone).ok());
  const NetworkPort::Outcome outcome = zero.wait_for_outcome();
  ASSERT_TRUE(outcome.error.has_value());
  EXPECT_THAT(outcome.error->message, HasSubstr("rank 1"));
  EXPECT_EQ(outcome.suspect, 1);
  EXPECT_LT(zero.clock.now_us() - begin_us, 1'500'000);
  for (const char* address : {"", "xyz", "00:", ":1", "0:1", "00:1x"}) {
    Side other(0);
    EXPECT_FALSE(other.connect(address).ok()) << address;
  }
}

TEST(NetworkPort, ALostPeerEndsTheEpochAndFlushReturns) {
  Side zero(0, 1'000'000);
  std::optional<Side> one(std::in_place, 1, 1'000'000);
  ASSERT_TRUE(zero.connect(one->port->address()).ok());
  ASSERT_TRUE(one->connect(zero.port->address()).ok());
  ASSERT_FALSE(zero.wait_for_outcome().error.has_value());
  ASSERT_FALSE(one->wait_for_outcome().error.has_value());
  zero.make_fabric();
  one.reset();
  const std::vector<std::byte> data(1'000'000);
  const int64_t begin_us = zero.clock.now_us();
  Status status;
  for (uint64_t round = 1; status.ok(); ++round) {
    zero.fabric->put(RankId(1), 0, data);
    zero.fabric->signal(RankId(1), Channel::kStep, round);
    status = zero.fabric->flush();
    if (status.ok()) status = zero.fabric->wait(RankId(1), Channel::kStep, round);
    ASSERT_LT(zero.clock.now_us() - begin_us, 5'000'000);
  }
  EXPECT_THAT(status.error().message, HasSubstr("rank 1"));
}

}  // namespace
}  // namespace tandem::group
