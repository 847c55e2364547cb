// The fabric of a group that spans hosts: ranks of this host are mapped, the others are reached through a NetworkPort.
//
// Signals of remote ranks are moved by the port into the same counters that mapped ranks write, so waiting is
// MappedFabric's.
#pragma once

#include <memory>
#include <vector>

#include "src/group/mapped_fabric.h"
#include "src/group/network_port.h"

namespace tandem::group {

class NetworkFabric final : public MappedFabric {
 public:
  // `is_remote`: by rank; `ranks` has stand-ins for those. The port is connected; it and the memory must outlive this.
  NetworkFabric(RankId rank, Epoch epoch, std::vector<MappedRank> ranks, std::vector<bool> is_remote,
                int64_t window_bytes, FabricLimits limits, const Clock& clock, NetworkPort& port);
  ~NetworkFabric() override;

  std::byte* direct(RankId to) override;
  void put(RankId to, int64_t offset, std::span<const std::byte> data) override;
  // Fails when the epoch has ended, and when the network takes nothing for kMostTimeouts rank time-outs. In any case
  // the data of every put() may be changed afterwards.
  Status flush() override;
  void signal(RankId to, Channel channel, uint64_t value) override;
  void beat() override;

 private:
  bool is_remote(RankId rank) const { return is_remote_[static_cast<size_t>(rank.value)]; }

  const std::vector<bool> is_remote_;
  NetworkPort& port_;
  int64_t pulse_us_ = 0;  // when the last one was sent
};

}  // namespace tandem::group
