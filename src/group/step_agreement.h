// Lockstep: before a step, every rank tells every other what it brings, and all see the same list.
//
// A round begins when some rank has work: it calls agree(), which rings the others; those without work see is_called()
// and join with zero rows. While nobody has work nothing is exchanged and every rank sleeps.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/base/result.h"
#include "src/group/fabric.h"

namespace tandem::group {

// What one rank brings to a step.
struct StepIntent {
  int64_t rows = 0;         // of its batch; 0: it only computes for others
  int64_t streams = 0;      // 1: answers are being generated here, so their next token waits for this step
  // Of balancing (src/ep/balancer.h).
  int64_t is_planned = 0;         // 1, of rank 0: a placement is ready to be announced
  int64_t placement_version = 0;  // how many changes of the placement this rank has carried out
  int64_t first_of_node = 0;      // the lowest rank whose window is mapped here
  int64_t can_split = 0;          // 1: rows enough for a step in two parts
  int64_t reserved[2] = {};
};

class StepAgreement {
 public:
  // Bytes at the begin of every window that belong to this class.
  static int64_t window_bytes(int32_t size);

  explicit StepAgreement(Fabric& fabric) : fabric_(fabric) {}

  // Another rank has begun the next round already.
  bool is_called() const;
  // Enters the next round and waits for all ranks: their intents in rank order. Fails as Fabric::wait.
  Result<std::vector<StepIntent>> agree(const StepIntent& mine);

  // Rounds so far.
  uint64_t rounds() const { return rounds_; }

 private:
  Fabric& fabric_;
  uint64_t rounds_ = 0;
};

// What takes part in every round beside the step itself.
class RoundUser {
 public:
  virtual ~RoundUser() = default;
  // First of all in a new epoch, on all ranks; it may run rounds of its own. Errors end the epoch, here and below.
  virtual Status begin_epoch(Fabric& fabric, StepAgreement& agreement) = 0;
  // Before this rank enters a round, and after it has left it, before it computes.
  virtual Status before_round(Fabric& fabric, StepIntent& mine) = 0;
  virtual Status after_round(Fabric& fabric, std::span<const StepIntent> intents) = 0;
  // What it moved with the last round: bytes that this rank has sent and taken.
  virtual int64_t carried_bytes() const { return 0; }
};

}  // namespace tandem::group
