#include "src/engine/lockstep.h"

#include <vector>

#include "src/base/log.h"

namespace tandem::engine {

Lockstep::Lockstep(group::RankGroup& group, group::FabricUser* user, Registry& registry, group::RoundUser* rounds)
    : group_(group),
      user_(user),
      round_user_(rounds),
      epochs_(registry.counter("tandem:group_epochs_total", "Formations of the rank group that this rank took part in.")),
      rounds_(registry.counter("tandem:group_rounds_total", "Steps that this rank computed together with the group.")),
      empty_rounds_(registry.counter("tandem:group_empty_rounds_total", "Of these, those without a row of its own.")),
      split_rounds_(registry.counter("tandem:group_split_rounds_total", "Of these, those in two parts (--enable-dbo).")),
      waited_us_(registry.counter("tandem:group_wait_microseconds_total",
                                  "Time that this rank waited for the others before a step.")) {}

Lockstep::~Lockstep() { leave(); }

bool Lockstep::is_standing() {
  if (fabric_ != nullptr && fabric_->status().ok()) return true;
  leave();  // before group_.fabric(), which may destroy the fabric of the ended epoch
  group::Fabric* const now = group_.fabric();
  if (now == nullptr || !now->status().ok()) return false;
  fabric_ = now;
  agreement_.emplace(*now);
  if (user_ != nullptr) user_->attach(*now);
  if (round_user_ != nullptr) {
    if (const Status begun = round_user_->begin_epoch(*now, *agreement_); !begun.ok()) {
      log_warning("group", "{}", begun.error().message);
      abandon(begun.error());
      group_.fabric();  // lets go of it: no other epoch begins before
      return false;
    }
  }
  epochs_.add(1);
  log_info("group", "rank {} of {} stands in epoch {}", now->rank(), now->size(), now->epoch());
  return true;
}

bool Lockstep::has_news() const {
  if (fabric_ == nullptr) return group_.status().ok();
  return !fabric_->status().ok() || is_called();
}

bool Lockstep::is_called() const { return agreement_ && agreement_->is_called(); }

Result<AgreedStep> Lockstep::agree(int64_t rows, bool has_streams, bool can_split) {
  CHECK(agreement_.has_value());
  group::StepIntent mine;
  mine.rows = rows;
  mine.streams = has_streams ? 1 : 0;
  mine.can_split = can_split ? 1 : 0;
  const int64_t begin_us = clock_.now_us();
  if (round_user_ != nullptr) TANDEM_TRY(round_user_->before_round(*fabric_, mine));
  const int64_t ready_us = clock_.now_us();
  TANDEM_ASSIGN(const std::vector<group::StepIntent> intents, agreement_->agree(mine));
  const int64_t agreed_us = clock_.now_us();
  waited_us_.add(static_cast<uint64_t>(agreed_us - ready_us));
  if (round_user_ != nullptr) TANDEM_TRY(round_user_->after_round(*fabric_, intents));
  rounds_.add(1);
  if (rows == 0) empty_rounds_.add(1);
  AgreedStep step;
  step.times.round = agreement_->rounds();
  step.times.wait_us = agreed_us - ready_us;
  step.times.ride_us = ready_us - begin_us + clock_.now_us() - agreed_us;
  if (round_user_ != nullptr) step.times.ride_bytes = round_user_->carried_bytes();
  step.is_split = true;
  for (size_t r = 0; r < intents.size(); ++r) {
    step.is_split = step.is_split && intents[r].can_split != 0;
    step.total_rows += intents[r].rows;
    if (static_cast<int32_t>(r) != fabric_->rank().value && intents[r].streams != 0) step.streams_elsewhere = true;
  }
  if (step.is_split) split_rounds_.add(1);
  return step;
}

void Lockstep::abandon(const Error& why) {
  if (fabric_ != nullptr) group_.report(why, std::nullopt);
  leave();
}

void Lockstep::leave() {
  if (user_ != nullptr && fabric_ != nullptr) user_->detach();
  agreement_.reset();
  fabric_ = nullptr;
}

}  // namespace tandem::engine
