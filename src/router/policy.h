// Which of the workers that could take a request gets it. Pure: loads in, one worker out.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string_view>

#include "src/base/ids.h"
#include "src/base/result.h"

namespace tandem::router {

// A worker of the registry; ids are given in turn and never mean another worker.
using WorkerId = StrongId<struct WorkerIdTag, int32_t>;

enum class PolicyKind : uint8_t {
  kRoundRobin,          // in turn
  kLeastLoad,           // fewest tokens in flight; in turn among equals
  kPowerOfTwo,          // the less loaded of two drawn at random
  kPrefixAware,         // least work: tokens in flight and those of the prompt that its prefix cache lacks
  kWeightedRoundRobin,  // in turn, as often as the weight says, spread evenly
  kSession,             // requests of one session to one worker; without a session as kLeastLoad
};

Result<PolicyKind> parse_policy(std::string_view name);  // "round_robin", …
const char* policy_name(PolicyKind kind);

struct Candidate {
  WorkerId worker;
  int64_t tokens_in_flight = 0;
  int64_t weight = 1;         // >= 1
  int64_t cached_tokens = 0;  // of the prompt, as far as the router knows
};

class Policy {
 public:
  explicit Policy(PolicyKind kind, uint64_t seed = 1) : kind_(kind), random_(seed) {}

  PolicyKind kind() const { return kind_; }
  // `candidates` is not empty and ascends by worker. `session` is the hash of the session's name, 0 for none.
  WorkerId pick(std::span<const Candidate> candidates, uint64_t session = 0);

 private:
  WorkerId least(std::span<const Candidate> candidates);
  WorkerId power_of_two(std::span<const Candidate> candidates);
  WorkerId weighted(std::span<const Candidate> candidates);

  PolicyKind kind_;
  uint64_t random_;
  WorkerId last_{-1};
  std::map<WorkerId, int64_t> credit_;  // kWeightedRoundRobin
};

}  // namespace tandem::router
