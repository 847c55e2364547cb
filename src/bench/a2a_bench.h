// Dispatch and combine of the experts' rows by themselves, beside a plain copy of the same bytes: a memcpy over shared
// memory, raw sockets over TCP.
//
// Each rank is a process on a core of its own as far as there are cores. In every round, all begin at once:
//   dispatch   from hidden rows to the operands of the experts: encode, send, receive, sort
//   experts    not timed: outputs stand ready in local memory
//   combine    the outputs for other ranks go from there to their places, then until this rank has all of its own
//   encoding   the first part of dispatch by itself; one rank alone does the same when its experts take rows
//   plain      what dispatch has sent, then what combine has: over shared memory by memcpy, each from one buffer to one
//              place per peer; over TCP by one raw socket per peer until all has come
// A round's time is that of its slowest rank. Own rows and outputs do not travel and are counted nowhere; in a step, the
// experts write outputs straight into place, so combine has no copy left: here it stands for what that writing costs. Over
// TCP they write into a buffer of their rank, as in a step, and combine begins there.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/result.h"
#include "src/ep/window_plan.h"

namespace tandem::bench {

// How ranks reach each other. kTcp: as ranks of other nodes do, but over loopback.
enum class A2aOver : uint8_t { kSharedMemory, kTcp };
const char* a2a_over_name(A2aOver over);  // "shm", "tcp"
Result<A2aOver> parse_a2a_over(std::string_view name);

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
  double plain_us = 0;   // of a plain copy of the same bytes
  double ratio = 0;      // of the medians
  double bytes = 0;      // sent by a rank, mean
  double gbytes() const { return bytes / us * 1e-3; }  // per second and rank
};

struct A2aLine {
  A2aOver over = A2aOver::kSharedMemory;
  ep::All2All backend = ep::All2All::kAllGather;
  int64_t ranks = 0;
  int64_t tokens = 0;
  int64_t rounds = 0;
  double window_mib = 0;  // of each rank
  A2aTimes dispatch;
  double encode_us = 0;  // by itself: part of dispatch, and of a step of one rank too
  A2aTimes combine;
};

// Ranks of this host. Forks: call it before the process has threads.
Result<A2aLine> measure_a2a(const A2aBenchOptions& options, A2aOver over, ep::All2All backend, int64_t ranks,
                            int64_t tokens);

// Heading and one line, as a Markdown table.
std::string a2a_heading();
std::string a2a_line_as_text(const A2aLine& line);

}  // namespace tandem::bench
