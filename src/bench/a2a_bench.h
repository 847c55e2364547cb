// Dispatch and combine of the experts' rows by themselves, beside a plain memcpy of the same bytes.
//
// Each rank is a process on a core of its own as far as there are cores. In every round, all begin at once:
//   dispatch   from hidden rows to the operands of the experts: encode, send, receive, sort
//   experts    not timed: outputs stand ready in local memory
//   combine    the outputs for other ranks go from there to their places, then until this rank has all of its own
//   encoding   the first part of dispatch by itself; one rank alone does the same when its experts take rows
//   memcpy     what dispatch has sent, then what combine has, each from one buffer to one place per peer
// A round's time is that of its slowest rank. Own rows and outputs do not travel and are counted nowhere; in a step, the
// experts write outputs straight into place, so combine has no copy left: here it stands for what that writing costs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/base/result.h"
#include "src/ep/window_plan.h"

namespace tandem::bench {

struct A2aBenchOptions {
  int64_t hidden = 2048;
  int64_t top_k = 8;
  int64_t num_experts = 64;
  kernels::RowFormat row_format = kernels::RowFormat::kExact;
  kernels::WeightFormat weights = kernels::kBf16Weights;  // which kExact rows are for
  double seconds = 0.5;                                   // of each line
  uint64_t seed = 0;                                      // of the uniform random routing
};

// One direction. Medians over the rounds.
struct A2aTimes {
  double us = 0;
  double memcpy_us = 0;
  double ratio = 0;       // of the medians
  double bytes = 0;       // sent by a rank, mean
  double gbytes() const { return bytes / us * 1e-3; }  // per second and rank
};

struct A2aLine {
  ep::All2All backend = ep::All2All::kAllGather;
  int64_t ranks = 0;
  int64_t tokens = 0;
  int64_t rounds = 0;
  double window_mib = 0;  // of each rank
  A2aTimes dispatch;
  double encode_us = 0;  // by itself: part of dispatch, and of a step of one rank too
  A2aTimes combine;
};

// Ranks of this host over shared memory. Forks: call it before the process has threads.
Result<A2aLine> measure_a2a(const A2aBenchOptions& options, ep::All2All backend, int64_t ranks, int64_t tokens);

// Heading and one line, as a Markdown table.
std::string a2a_heading();
std::string a2a_line_as_text(const A2aLine& line);

}  // namespace tandem::bench
