// The engine's part in its rank group: which epoch it computes in, and when a step begins.
//
// With experts on all ranks no rank computes a step alone. A rank with rows enters the next round; the others are rung,
// see is_called() and join, if need be with no rows. All enter a round with the same list of intents, so all agree on
// what the step is. Belongs to the engine thread.
#pragma once

#include <cstdint>
#include <optional>

#include "src/base/clock.h"
#include "src/base/metrics.h"
#include "src/engine/step_log.h"
#include "src/group/rank_group.h"
#include "src/group/step_agreement.h"

namespace tandem::engine {

struct AgreedStep {
  int64_t total_rows = 0;
  bool streams_elsewhere = false;  // another rank generates answers: its next token waits for this step
  bool is_split = false;           // all ranks compute it in two parts
  StepTimes times;                 // round, wait and ride
};

class Lockstep {
 public:
  // All outlive this. `user` may be null (a test without experts), and `rounds` (nothing else rides along).
  Lockstep(group::RankGroup& group, group::FabricUser* user, Registry& registry, group::RoundUser* rounds = nullptr);
  ~Lockstep();

  comm::Bell& bell() { return group_.bell(); }
  // Takes up the epoch that stands now. False while none does: nothing can be computed.
  bool is_standing();
  // Which one that is; while is_standing().
  group::Epoch epoch() const { return fabric_->epoch(); }
  // Why none stands.
  Status status() const { return group_.status(); }
  // is_standing() or is_called() may have changed since they were called.
  bool has_news() const;
  // Another rank waits for this one to begin a step.
  bool is_called() const;
  // Enters the next round and waits for all.
  Result<AgreedStep> agree(int64_t rows, bool has_streams, bool can_split = false);
  // This rank's part of a step failed; the epoch is over for all.
  void abandon(const Error& why);

 private:
  void leave();

  group::RankGroup& group_;
  group::FabricUser* const user_;
  group::RoundUser* const round_user_;
  group::Fabric* fabric_ = nullptr;  // of the epoch taken up
  std::optional<group::StepAgreement> agreement_;
  const SteadyClock clock_;
  Counter& epochs_;
  Counter& rounds_;
  Counter& empty_rounds_;
  Counter& split_rounds_;
  Counter& waited_us_;
};

}  // namespace tandem::engine
