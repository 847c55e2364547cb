// Which of the workers that could take a request gets it. Pure: loads in, one worker out.
#pragma once

#include <cstdint>
#include <span>

#include "src/base/ids.h"

namespace tandem::router {

// A worker of the registry, 0 … num_workers - 1.
using WorkerId = StrongId<struct WorkerIdTag, int32_t>;

enum class PolicyKind : uint8_t {
  kRoundRobin,  // in turn
  kLeastLoad,   // fewest tokens in flight; in turn among equals
};

struct Candidate {
  WorkerId worker;
  int64_t tokens_in_flight = 0;
};

class Policy {
 public:
  explicit Policy(PolicyKind kind) : kind_(kind) {}

  // `candidates` is not empty and ascends by worker.
  WorkerId pick(std::span<const Candidate> candidates);

 private:
  PolicyKind kind_;
  WorkerId last_{-1};
};

}  // namespace tandem::router
