#include "src/engine/follower.h"

#include <algorithm>

#include "src/base/check.h"
#include "src/base/log.h"

namespace tandem::engine {
namespace {

// The bell is rung for everything there is to do; this only bounds one sleep.
constexpr int64_t kLongSleepUs = 3'600'000'000;

// What the leader's pool has handed out last is at the end of a sequence.
int64_t used_blocks(const model::Batch& batch) {
  int32_t used = 0;
  for (const model::Chunk& chunk : batch.chunks) used = std::max(used, chunk.blocks.back().value + 1);
  return used;
}

}  // namespace

void Follower::start() {
  CHECK(!thread_.joinable());
  thread_ = std::thread([this] { run(); });
}

void Follower::stop() {
  is_stopping_ = true;
  lockstep_.bell().ring();
  if (thread_.joinable()) thread_.join();
}

void Follower::run() {
  while (true) {
    const uint32_t rung = lockstep_.bell().count();
    if (is_stopping_) return;
    if (!lockstep_.is_standing() || !lockstep_.is_called()) {
      if (!lockstep_.has_news()) lockstep_.bell().wait(rung, kLongSleepUs);
      continue;
    }
    if (const Status computed = compute_round(); !computed.ok()) {
      log_warning("engine", "{}", computed.error().message);
      lockstep_.abandon(computed.error());
    }
  }
}

// In two parts if the leaders want that; this rank does as its leader.
Status Follower::compute_round() {
  TANDEM_ASSIGN(const AgreedStep agreed, lockstep_.agree(0, false, true));
  if (agreed.total_rows == 0) return {};  // nobody computes
  TANDEM_ASSIGN(const model::Batch batch, orders_.receive(cache_));
  if (populator_ != nullptr) populator_->note_used(used_blocks(batch));
  return model_.forward(batch, cache_, {});
}

}  // namespace tandem::engine
