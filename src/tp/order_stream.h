// The orders of the first tensor rank to the others: a stream of bytes through a ring in each one's window.
//
// The first rank alone has a scheduler. Before it computes a step it sends the batch; the others compute the same batch
// on their share of the model. KV that came from another worker goes along, since it came to the first rank only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/group/fabric.h"
#include "src/model/kv_cache.h"
#include "src/tp/batch_bytes.h"

namespace tandem::tp {

struct OrderOptions {
  group::RankId first;        // the rank that orders; tensor rank t is rank first + t
  int32_t num_ranks = 1;      // tensor ranks, the first included
  int64_t window_offset = 0;  // of the ring; a multiple of 64
  int64_t ring_bytes = int64_t{1} << 20;
};

class OrderSender final : public group::FabricUser {
 public:
  explicit OrderSender(const OrderOptions& options) : options_(options) {}
  void attach(group::Fabric& fabric) override;
  void detach() override { fabric_ = nullptr; }

  // Returns once everything is on its way; waits while rings are full. Errors are those of a lost group. If `cache` is a
  // part of one that all ranks share, what was received is there already, and none of it is news.
  Status send(const model::Batch& batch, const CacheNews& news, const model::KvCache& cache);

 private:
  Status write(std::span<const std::byte> bytes);

  const OrderOptions options_;
  group::Fabric* fabric_ = nullptr;
  uint64_t written_ = 0;  // bytes of this epoch
};

class OrderReceiver final : public group::FabricUser {
 public:
  explicit OrderReceiver(const OrderOptions& options) : options_(options) {}
  void attach(group::Fabric& fabric) override;
  void detach() override { fabric_ = nullptr; }

  // The next order; the KV that came with it, or was to be made up, is in `cache` then. Errors as above, and kDataLoss:
  // also if only one of the two ranks has a part of a shared cache.
  Result<model::Batch> receive(model::KvCache& cache);

 private:
  Status read(std::span<std::byte> out);
  Status check_blocks(std::span<const BlockId> blocks, const model::KvCache& cache) const;

  const OrderOptions options_;
  group::Fabric* fabric_ = nullptr;
  uint64_t read_ = 0;
  uint64_t acknowledged_ = 0;  // of these
};

}  // namespace tandem::tp
