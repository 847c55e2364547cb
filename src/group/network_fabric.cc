#include "src/group/network_fabric.h"

#include <algorithm>
#include <utility>

namespace tandem::group {
namespace {

constexpr int64_t kPulsesPerTimeout = 10;  // to remote ranks, however often beat() is called
constexpr int64_t kThreadsPerRank = 2;     // engine and port: a wait that looks must not keep its own port from running
constexpr int64_t kLookUpUs = 50'000;      // while it waits for the network

}  // namespace

NetworkFabric::NetworkFabric(RankId rank, Epoch epoch, std::vector<MappedRank> ranks, std::vector<bool> is_remote,
                             int64_t window_bytes, FabricLimits limits, const Clock& clock, NetworkPort& port)
    : MappedFabric(rank, epoch, std::move(ranks), window_bytes, limits, clock,
                   kThreadsPerRank * std::count(is_remote.begin(), is_remote.end(), false)),
      is_remote_(std::move(is_remote)),
      port_(port) {
  port_.set_on_lost([this](const Error& why) { end(why); });
}

NetworkFabric::~NetworkFabric() { port_.set_on_lost(nullptr); }

std::byte* NetworkFabric::direct(RankId to) { return is_remote(to) ? nullptr : MappedFabric::direct(to); }

void NetworkFabric::put(RankId to, int64_t offset, std::span<const std::byte> data) {
  if (!is_remote(to)) {
    MappedFabric::put(to, offset, data);
    return;
  }
  CHECK_GE(offset, 0);
  CHECK_LE(offset + std::ssize(data), window_bytes());
  if (status().ok()) port_.put(to, offset, data);
}

Status NetworkFabric::flush() {
  port_.push();
  const int64_t begin_us = clock().now_us();
  while (true) {
    const uint32_t rung = own_bell().count();
    Status ended = status();
    const std::optional<RankId> slow = port_.unsent_to();
    if (ended.ok() && !slow) return {};
    if (ended.ok() && clock().now_us() - begin_us >= limits().rank_timeout_us * FabricLimits::kMostTimeouts) {
      ended = make_error(ErrorKind::kUnavailable, "rank {} has taken nothing from the network for {:.1f} s", *slow,
                         static_cast<double>(clock().now_us() - begin_us) * 1e-6);
    }
    if (!ended.ok()) {
      port_.abandon();
      return ended;
    }
    beat();
    own_bell().wait(rung, kLookUpUs);
  }
}

void NetworkFabric::signal(RankId to, Channel channel, uint64_t value) {
  if (!is_remote(to)) {
    MappedFabric::signal(to, channel, value);
  } else if (status().ok()) {
    port_.signal(to, channel, value);
  }
}

void NetworkFabric::beat() {
  MappedFabric::beat();
  const int64_t now_us = clock().now_us();
  if (now_us - pulse_us_ < limits().rank_timeout_us / kPulsesPerTimeout) return;
  pulse_us_ = now_us;
  if (status().ok()) port_.send_pulse();
}

}  // namespace tandem::group
