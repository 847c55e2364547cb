#include "src/group/epoch_memory.h"

#include <cstring>

#include "src/base/clock.h"

namespace tandem::group {
namespace {

// Behind the window, on a cache line of its own.
constexpr int64_t kStampBytes = 64;

}  // namespace

Result<std::unique_ptr<EpochMemory>> EpochMemory::make(RankId rank, int32_t size, int64_t window_bytes,
                                                       const comm::SharedRegion& bell) {
  std::unique_ptr<EpochMemory> memory(new EpochMemory);
  memory->region_bytes_ = (MappedFabric::region_bytes(size, window_bytes) + kStampBytes - 1) / kStampBytes * kStampBytes;
  TANDEM_ASSIGN(memory->own_, comm::SharedRegion::create("tandem-window", memory->region_bytes_ + kStampBytes));
  memory->stamp_ = random_u64();
  std::memcpy(memory->own_.data() + memory->region_bytes_, &memory->stamp_, sizeof memory->stamp_);
  memory->bell_ = bell.address();
  memory->ranks_.resize(static_cast<size_t>(size));
  memory->ranks_[static_cast<size_t>(rank.value)] = {memory->own_.data(), bell.data()};
  return memory;
}

WindowAddress EpochMemory::address() const { return {own_.address(), bell_, stamp_, ""}; }

Status EpochMemory::map(RankId rank, const WindowAddress& address) {
  const auto name = [rank](const Error& error) {
    return make_error(ErrorKind::kUnavailable, "the window of rank {}: {}", rank, error.message);
  };
  Result<comm::SharedRegion> region = comm::SharedRegion::open(address.region, comm::SharedRegion::Access::kReadWrite);
  if (!region.ok()) return name(region.error());
  Result<comm::SharedRegion> bell = comm::SharedRegion::open(address.bell, comm::SharedRegion::Access::kReadWrite);
  if (!bell.ok()) return name(bell.error());
  if (region->bytes() != own_.bytes() || bell->bytes() < comm::Bell::kBytes) {
    return make_error(ErrorKind::kUnavailable, "the window of rank {} has {} bytes instead of {}, its bell {}", rank,
                      region->bytes(), own_.bytes(), bell->bytes());
  }
  uint64_t stamp = 0;
  std::memcpy(&stamp, region->data() + region_bytes_, sizeof stamp);
  if (stamp != address.stamp) {
    return make_error(ErrorKind::kUnavailable, "the window of rank {}: descriptor {} of process {} is not it", rank,
                      address.region.fd, address.region.pid);
  }
  ranks_[static_cast<size_t>(rank.value)] = {region->data(), bell->data()};
  opened_.push_back(std::move(*region));
  opened_.push_back(std::move(*bell));
  return {};
}

void EpochMemory::stand_in(RankId rank) {
  // One page of header is enough: nobody writes to the counters of a rank that is not mapped.
  comm::SharedRegion pulse = comm::SharedRegion::create("tandem-pulse", kStampBytes).value();
  ranks_[static_cast<size_t>(rank.value)] = {pulse.data(), own_.data()};
  opened_.push_back(std::move(pulse));
}

}  // namespace tandem::group
