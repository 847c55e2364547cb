// The memory that the ranks of one formed group (one epoch) write into each other, and the counters by which they say
// that they have.
//
// Every rank has a window of the same size. A peer writes anywhere in it (who writes where is agreed by what lies above:
// StepAgreement, src/ep), then raises one of its counters there. Windows of ranks on the same host are mapped, so
// writing is a copy; those of other hosts are reached through the network.
//
// A fabric lives for one epoch. When a rank is lost the epoch ends for all: every wait returns an error that names the
// rank, and what a late writer of the old epoch still writes goes into memory that nobody reads.
//
// Threading: everything but end() belongs to the engine thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "src/base/ids.h"
#include "src/base/result.h"

namespace tandem::group {

// A process of a group, 0 … size - 1. With tensor parallelism T, rank r is tensor rank r % T of data rank r / T.
using RankId = StrongId<struct RankIdTag, int32_t>;
// Counts formations of a group; never reused while its coordinator lives.
using Epoch = StrongId<struct EpochTag, uint64_t>;

inline constexpr int32_t kMaxRanks = 1024;

// What a counter is for. A rank has one of each at every other rank.
enum class Channel : uint8_t {
  kStep,
  kCounts,
  kDispatch,
  kCombine,
  kBarrier,
  kWeights,
  kMove,
  kReduce,
  kShare,
  kLogits,
  kOrders,
  // Of the second part of a step.
  kSecondCounts,
  kSecondDispatch,
  kSecondCombine,
};
inline constexpr int64_t kNumChannels = 16;
const char* channel_name(Channel channel);  // "step", "dispatch", …

class Fabric {
 public:
  virtual ~Fabric() = default;
  virtual RankId rank() const = 0;
  virtual int32_t size() const = 0;
  virtual Epoch epoch() const = 0;

  // This rank's own window; zeroed when the epoch began.
  virtual std::span<std::byte> window() = 0;
  // The window of `to` if it is mapped here (own rank included), to be written in place; null on another host.
  virtual std::byte* direct(RankId to) = 0;
  // Copies `data` to `offset` in the window of `to`. Of a remote window `data` must stay as it is until flush().
  virtual void put(RankId to, int64_t offset, std::span<const std::byte> data) = 0;
  // Returns when the data of every put() may be changed again.
  virtual Status flush() = 0;

  // Sets this rank's counter `channel` at `to`, visible only after all that was written to `to` before. Values grow.
  virtual void signal(RankId to, Channel channel, uint64_t value) = 0;
  // The counter of `from` here. What `from` wrote before setting it is visible.
  virtual uint64_t signalled(RankId from, Channel channel) const = 0;
  // Sleeps until signalled(from, channel) >= value. Fails when the epoch has ended, or when `from` has shown no sign of
  // life for the rank time-out; the error is kUnavailable and names it.
  virtual Status wait(RankId from, Channel channel, uint64_t value) = 0;

  // A sign of life for those who wait: call it between the parts of a long computation. Cheap.
  virtual void beat() = 0;
  // Ends the epoch here: waits fail with `why` from now on. From any thread.
  virtual void end(const Error& why) = 0;
  // Whether it has ended, and why.
  virtual Status status() const = 0;
};

// What computes over the fabric of the epoch that stands.
class FabricUser {
 public:
  virtual ~FabricUser() = default;
  virtual void attach(Fabric& fabric) = 0;  // must outlive detach()
  virtual void detach() = 0;
};

}  // namespace tandem::group
