#include "src/tp/order_stream.h"

#include <algorithm>
#include <cstring>

#include "src/base/check.h"

namespace tandem::tp {

using group::Channel;
using group::RankId;

void OrderSender::attach(group::Fabric& fabric) {
  CHECK_EQ(fabric.rank(), options_.first);
  fabric_ = &fabric;
  written_ = 0;
}

Status OrderSender::send(const model::Batch& batch, const CacheNews& news, const model::KvCache& cache) {
  CHECK(fabric_ != nullptr);
  CHECK(!cache.is_part() || news.received.empty());
  const std::vector<int32_t> numbers = write_order(batch, news, cache.is_part());
  TANDEM_TRY(write(std::as_bytes(std::span(numbers))));
  const size_t block_bytes = static_cast<size_t>(cache.layout().block_bytes());
  for (const BlockId block : news.received) {
    for (int64_t layer = 0; layer < cache.layout().num_layers; ++layer) {
      TANDEM_TRY(write({cache.block_address(layer, block), block_bytes}));
    }
  }
  return {};
}

// Piece by piece, so that all can read at once.
Status OrderSender::write(std::span<const std::byte> bytes) {
  const uint64_t ring = static_cast<uint64_t>(options_.ring_bytes);
  while (!bytes.empty()) {
    const uint64_t place = written_ % ring;
    const size_t count = static_cast<size_t>(std::min({uint64_t{bytes.size()}, ring - place, ring / 2}));
    const uint64_t end = written_ + count;
    for (int32_t t = 1; t < options_.num_ranks; ++t) {
      const RankId to(options_.first.value + t);
      if (end > ring) TANDEM_TRY(fabric_->wait(to, Channel::kOrders, end - ring));
      fabric_->put(to, options_.window_offset + static_cast<int64_t>(place), bytes.first(count));
    }
    TANDEM_TRY(fabric_->flush());
    for (int32_t t = 1; t < options_.num_ranks; ++t) {
      fabric_->signal(RankId(options_.first.value + t), Channel::kOrders, end);
    }
    written_ = end;
    bytes = bytes.subspan(count);
  }
  return {};
}

void OrderReceiver::attach(group::Fabric& fabric) {
  CHECK_GE(std::ssize(fabric.window()), options_.window_offset + options_.ring_bytes);
  fabric_ = &fabric;
  read_ = acknowledged_ = 0;
}

Result<model::Batch> OrderReceiver::receive(model::KvCache& cache) {
  CHECK(fabric_ != nullptr);
  int32_t count = 0;
  TANDEM_TRY(read(std::as_writable_bytes(std::span(&count, 1))));
  std::vector<int32_t> numbers(static_cast<size_t>(std::max(count, 0)));
  TANDEM_TRY(read(std::as_writable_bytes(std::span(numbers))));
  TANDEM_ASSIGN(StepOrder order, read_order(numbers));
  if (order.has_part != cache.is_part()) {
    return make_error(ErrorKind::kDataLoss,
                      "rank {} keeps its KV in {}, this rank in {}; let tensor rank 0 start the others itself",
                      options_.first, order.has_part ? "one memory for all tensor ranks" : "memory of its own",
                      cache.is_part() ? "one memory for all" : "memory of its own");
  }
  TANDEM_TRY(check_blocks(order.news.received, cache));
  TANDEM_TRY(check_blocks(order.news.filled, cache));
  for (const model::Chunk& chunk : order.batch.chunks) TANDEM_TRY(check_blocks(chunk.blocks, cache));
  const size_t block_bytes = static_cast<size_t>(cache.layout().block_bytes());
  for (const BlockId block : order.news.received) {
    for (int64_t layer = 0; layer < cache.layout().num_layers; ++layer) {
      TANDEM_TRY(read({cache.block_address(layer, block), block_bytes}));
    }
  }
  for (const BlockId block : order.news.filled) cache.fill(block, order.news.fill_value);
  return std::move(order.batch);
}

Status OrderReceiver::read(std::span<std::byte> out) {
  const uint64_t ring = static_cast<uint64_t>(options_.ring_bytes);
  while (!out.empty()) {
    TANDEM_TRY(fabric_->wait(options_.first, Channel::kOrders, read_ + 1));
    const uint64_t there = fabric_->signalled(options_.first, Channel::kOrders) - read_;
    const uint64_t place = read_ % ring;
    const size_t count = static_cast<size_t>(std::min({uint64_t{out.size()}, ring - place, there}));
    std::memcpy(out.data(), fabric_->window().data() + options_.window_offset + place, count);
    read_ += count;
    // Now and then is enough: the writer waits for room of half a ring at most.
    if (read_ - acknowledged_ >= ring / 4) {
      fabric_->signal(options_.first, Channel::kOrders, read_);
      acknowledged_ = read_;
    }
    out = out.subspan(count);
  }
  return {};
}

Status OrderReceiver::check_blocks(std::span<const BlockId> blocks, const model::KvCache& cache) const {
  for (const BlockId block : blocks) {
    if (block.value >= 0 && block.value < cache.num_blocks()) continue;
    return make_error(ErrorKind::kDataLoss,
                      "rank {} ordered KV block {}, this rank has 0 … {}; give all ranks the same --num-gpu-blocks-override",
                      options_.first, block, cache.num_blocks() - 1);
  }
  return {};
}

}  // namespace tandem::tp
