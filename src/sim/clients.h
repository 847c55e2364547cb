// The clients of a simulated cluster: what they ask, what must come back, and how each request ends.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "src/engine/worker.h"
#include "src/sim/checker.h"

namespace tandem::sim {

enum class Plan : uint8_t { kPush, kPull, kLocal };

struct RequestSpec {
  Plan plan = Plan::kPush;
  std::vector<TokenId> prompt;
  int64_t max_tokens = 1;
  int64_t deadline_us = 0;
  int attempts = 1;
  int64_t cancel_at_us = 0;     // 0: never
  bool tells_deadline = true;   // workers are given the deadline; else only the router keeps it
  bool may_be_refused = false;  // a worker's queue may be full
  bool may_lack_room = false;   // no worker computes the whole prompt, and one may be too small for its transfer
  bool has_time = false;        // all requests of the run together take less than its deadline allows
  int prefill = -1;             // -1: any
  int decode = -1;
};

// One request as its client sees it.
struct ClientRequest {
  size_t index = 0;
  RequestSpec spec;
  std::vector<TokenId> expected;
  std::vector<TokenId> tokens;
  int64_t start_us = 0;
  std::vector<int> nodes;  // where the legs of its present attempt are
  bool fetches = false;    // the second leg of a pull has begun
  bool cancelled = false;
  bool ended = false;
};

class Clients {
 public:
  // A worker that says nothing after the deadline is given up this much later: the longest step, and the way back.
  static constexpr int64_t kGraceUs = 3'000'000;

  Clients(EventQueue& queue, Trace& trace, Checker& checker) : queue_(queue), trace_(trace), checker_(checker) {}

  void arrive(ClientRequest& request, RequestSpec spec, size_t index);
  // Tokens that `node` sent: each is the next of the request's own.
  void take_tokens(ClientRequest& request, int node, const engine::TokenEvent& event);
  // The one end, in time and with a reason. Null: it ended well.
  void end(ClientRequest& request, const Error* error);

  int64_t num_unfinished() const { return std::ssize(unfinished_); }
  int64_t num_ok() const { return num_ok_; }
  int64_t num_failed() const { return num_failed_; }
  int64_t num_late() const { return num_late_; }  // of the failed ones: at their deadline
  void check_at_rest() const;

 private:
  std::vector<int> nodes_behind(const ClientRequest& request) const;
  void check_wait(const ClientRequest& request, const Error& error, int64_t late_us);

  EventQueue& queue_;
  Trace& trace_;
  Checker& checker_;
  std::set<const ClientRequest*> unfinished_;
  int64_t num_ok_ = 0;
  int64_t num_failed_ = 0;
  int64_t num_late_ = 0;
};

}  // namespace tandem::sim
