// A simulated client and router: drives requests through pairs of workers and checks what comes back. It stands where
// RoutedWorker and TwoLegs stand in production, and knows workers only through Legs.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/sim/checker.h"
#include "src/sim/legs.h"
#include "src/sim/random.h"

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
  int prefill = -1;             // -1: any
  int decode = -1;
};

class Router {
 public:
  // A worker that says nothing after the deadline is given up this much later: the longest step, and the way back.
  static constexpr int64_t kGraceUs = 3'000'000;

  // Workers 0 … num_prefill - 1 take prefill legs, the `num_decode` after them decode legs; if they are `all_alike`,
  // each takes both, also of one request.
  Router(EventQueue& queue, Random& random, Trace& trace, Checker& checker, Legs& legs, int num_prefill, int num_decode,
         bool all_alike);

  void start(RequestSpec spec);
  // Sends the second leg of a request that ended well once more, with the handle that it has used: it must fail, and
  // nobody else may notice (I2).
  void replay();
  // Requests that have not ended, and those that ended well and with an error.
  int64_t num_unfinished() const { return num_unfinished_; }
  int64_t num_ok() const { return num_ok_; }
  int64_t num_failed() const { return num_failed_; }
  // The load counters of all workers are back at zero.
  void check_at_rest() const;

 private:
  struct Request {
    size_t index = 0;
    RequestSpec spec;
    std::vector<TokenId> expected;
    std::vector<TokenId> tokens;
    int64_t start_us = 0;
    int attempt = 0;
    int prefill = -1;
    int decode = -1;
    LegId prefill_leg;  // 0: none
    LegId decode_leg;
    std::optional<transfer::KvTransferParams> used;  // what the second leg was given
    bool cancelled = false;
    bool ended = false;
  };
  engine::TokenRequest token_request(const Request& request) const;
  void attempt(Request& request);
  void open_prefill(Request& request, engine::TokenRequest leg);
  void open_decode(Request& request, engine::TokenRequest leg);
  void on_prefill(Request& request, engine::TokenEvent&& event);
  void on_decode(Request& request, engine::TokenEvent&& event);
  void take_tokens(Request& request, const engine::TokenEvent& event);
  void leg_ended(Request& request, LegId& leg, int node, const engine::TokenEvent& event);
  void drop_leg(LegId& leg, int node);
  void drop_legs(Request& request);
  void fail_attempt(Request& request, const Error& error);
  void end(Request& request, const Error* error);
  void on_cancel(Request& request);
  void on_deadline(Request& request);

  EventQueue& queue_;
  Random& random_;
  Trace& trace_;
  Checker& checker_;
  Legs& legs_;
  const int num_prefill_;
  const int num_decode_;
  const bool all_alike_;
  std::vector<std::unique_ptr<Request>> requests_;
  std::vector<int64_t> load_;  // legs in flight by node: prefill workers, then decode workers
  int64_t num_unfinished_ = 0;
  int64_t num_ok_ = 0;
  int64_t num_failed_ = 0;
};

}  // namespace tandem::sim
