// What may go wrong in a simulation, and how often. The text form is `--faults`.
#pragma once

#include <string>
#include <string_view>

#include "src/base/result.h"

namespace tandem::sim {

struct FaultSpec {
  // Of each message between agents:
  double delay = 0;      // it comes up to 200 ms late (and holds up those behind it)
  double duplicate = 0;  // it comes a second time later
  double lose = 0;       // it never comes
  double drop = 0;       // its connection breaks
  double damage = 0;     // one bit of its payload is wrong
  // Of each 100 ms while there is load:
  double kill = 0;       // of a worker: it dies, and a new one starts at its address
  double freeze = 0;     // of a worker: it handles nothing for 10 ms … 15 s
  double partition = 0;  // of a pair of workers: one direction or both are cut for 10 ms … 8 s
  // Of each request:
  double cancel = 0;  // its client leaves at some moment

  // Something here can make a request fail that nobody cancelled.
  bool disturbs() const;
  std::string describe() const;  // as parse_fault_spec takes it
  bool operator==(const FaultSpec&) const = default;
};

// Every fault at the rate that `tandem sim` has by default.
FaultSpec all_faults();
// "none", "all", "delay=0.3,kill=0.02", "all,kill=0". The error names the part that is wrong.
Result<FaultSpec> parse_fault_spec(std::string_view text);

}  // namespace tandem::sim
