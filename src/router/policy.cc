#include "src/router/policy.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "src/base/check.h"

namespace tandem::router {
namespace {

constexpr std::pair<PolicyKind, const char*> kNames[] = {
    {PolicyKind::kRoundRobin, "round_robin"},  {PolicyKind::kLeastLoad, "least_load"},
    {PolicyKind::kPowerOfTwo, "power_of_two"}, {PolicyKind::kPrefixAware, "prefix_aware"},
    {PolicyKind::kSession, "session"},         {PolicyKind::kWeightedRoundRobin, "weighted_round_robin"},
};

// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
uint64_t mix(uint64_t value) {
  value += 0x9E3779B97F4A7C15ULL;
  value = (value ^ (value >> 30U)) * 0xBF58476D1CE4E5B9ULL;
  value = (value ^ (value >> 27U)) * 0x94D049BB133111EBULL;
  return value ^ (value >> 31U);
}

// Rendezvous hashing (Thaler, Ravishankar 1998): a worker that comes or goes moves only its own sessions.
WorkerId by_session(std::span<const Candidate> candidates, uint64_t session) {
  const auto score = [session](const Candidate& candidate) {
    return mix(session ^ mix(static_cast<uint64_t>(candidate.worker.value)));
  };
  return std::max_element(candidates.begin(), candidates.end(),
                          [&](const Candidate& a, const Candidate& b) { return score(a) < score(b); })
      ->worker;
}

}  // namespace

Result<PolicyKind> parse_policy(std::string_view name) {
  for (const auto& [kind, known] : kNames) {
    if (name == known) return kind;
  }
  return invalid_argument("policy",
                          "'{}' is not a policy; give round_robin, least_load, power_of_two, prefix_aware, "
                          "weighted_round_robin or session",
                          name);
}

const char* policy_name(PolicyKind kind) {
  for (const auto& [known, name] : kNames) {
    if (kind == known) return name;
  }
  return "?";
}

WorkerId Policy::pick(std::span<const Candidate> candidates, uint64_t session) {
  CHECK(!candidates.empty());
  switch (kind_) {
    case PolicyKind::kPowerOfTwo:
      return power_of_two(candidates);
    case PolicyKind::kWeightedRoundRobin:
      return weighted(candidates);
    case PolicyKind::kSession:
      if (session != 0) return by_session(candidates, session);
      break;
    case PolicyKind::kRoundRobin:
    case PolicyKind::kLeastLoad:
    case PolicyKind::kPrefixAware:
      break;
  }
  return least(candidates);
}

// In turn among those with the least work: the next after the last one picked, and the first one if none follows.
WorkerId Policy::least(std::span<const Candidate> candidates) {
  const auto work = [this](const Candidate& candidate) {
    return kind_ == PolicyKind::kRoundRobin ? 0 : candidate.tokens_in_flight - candidate.cached_tokens;
  };
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const Candidate& candidate : candidates) least = std::min(least, work(candidate));
  std::optional<WorkerId> first;
  std::optional<WorkerId> next;
  for (const Candidate& candidate : candidates) {
    if (work(candidate) > least) continue;
    if (!first) first = candidate.worker;
    if (!next && candidate.worker > last_) next = candidate.worker;
  }
  last_ = next ? *next : *first;
  return last_;
}

// Mitzenmacher: The power of two choices in randomized load balancing, 2001.
WorkerId Policy::power_of_two(std::span<const Candidate> candidates) {
  random_ = mix(random_);
  const size_t first = random_ % candidates.size();
  if (candidates.size() == 1) return candidates.front().worker;
  const size_t second = (first + 1 + (random_ >> 32U) % (candidates.size() - 1)) % candidates.size();
  return candidates[candidates[second].tokens_in_flight < candidates[first].tokens_in_flight ? second : first].worker;
}

// Each gains its weight, the richest pays for all: a worker of weight 3 beside one of weight 1 comes as 0 0 1 0.
WorkerId Policy::weighted(std::span<const Candidate> candidates) {
  int64_t total = 0;
  std::optional<WorkerId> richest;
  for (const Candidate& candidate : candidates) {
    CHECK_GE(candidate.weight, 1);
    total += candidate.weight;
    credit_[candidate.worker] += candidate.weight;
    if (!richest || credit_[candidate.worker] > credit_[*richest]) richest = candidate.worker;
  }
  credit_[*richest] -= total;
  return *richest;
}

}  // namespace tandem::router
