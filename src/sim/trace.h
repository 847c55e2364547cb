// What happened in a run: a hash of everything, and the records to read after a violation.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/sim/event_queue.h"

namespace tandem::sim {

enum class What : uint8_t {
  kMessage,    // a: connection, b: message type
  kAccept,     // a: connection
  kClosed,     // a: connection
  kDuplicate,  // a: connection it comes in by, b: message type
  kLose,       // the same
  kDamage,     // the same
  kBreak,      // a: connection
  kTurn,       // of the engine; a: Engine::Turn, b: sequences
  kOpen,       // of a transfer; a: id, b: TransferKind
  kDone,       // a: id, b: 0 or 1 + ErrorKind
  kAbort,      // a: id
  kKill,       // a: incarnation
  kStart,      // a: incarnation
  kFreeze,     // a: for how many µs
  kCut,        // from node; a: to node, b: for how many µs
  kArrive,     // of a request; a: request, b: plan
  kLeg,        // a: request, b: leg
  kLegToken,   // a: request, b: token
  kLegEnd,     // a: request, b: 0 or 1 + ErrorKind
  kCancel,     // a: request
  kRetry,      // a: request
  kReplay,     // a: request
  kEnd,        // a: request, b: 0 or 1 + ErrorKind
  kQuiet,      // the load is over
};

class Trace {
 public:
  explicit Trace(const Clock& clock) : clock_(clock) {}

  void add(What what, int32_t node, uint64_t a = 0, uint64_t b = 0) {
    const Record record{clock_.now_us(), what, node, a, b};
    mix(static_cast<uint64_t>(record.at_us));
    mix(static_cast<uint64_t>(what) << 32 | static_cast<uint32_t>(node));
    mix(a);
    mix(b);
    records_.push_back(record);
  }
  // Of every record, in order.
  uint64_t hash() const { return hash_; }
  int64_t size() const { return std::ssize(records_); }
  // The last `count` records, one a line; all if count is 0.
  std::string text(int64_t count) const;

 private:
  struct Record {
    int64_t at_us;
    What what;
    int32_t node;
    uint64_t a;
    uint64_t b;
  };
  void mix(uint64_t value) { hash_ = (hash_ ^ value ^ (value >> 31)) * 0x9e3779b97f4a7c15; }
  static std::string line(const Record& record);

  const Clock& clock_;
  std::vector<Record> records_;
  uint64_t hash_ = 0;
};

// "ok", or the name of the ErrorKind that was added to 1.
std::string outcome_name(uint64_t value);

}  // namespace tandem::sim
