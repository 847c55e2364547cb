// A router that is not Tandem's: it drives requests through pairs of workers by the same protocol and forgets things.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/sim/clients.h"
#include "src/sim/legs.h"
#include "src/sim/random.h"

namespace tandem::sim {

class Router {
 public:
  // Workers 0 … num_prefill - 1 take prefill legs, the `num_decode` after them decode legs; if they are `all_alike`,
  // each takes both, also of one request.
  Router(EventQueue& queue, Random& random, Trace& trace, Checker& checker, Legs& legs, int num_prefill, int num_decode,
         bool all_alike);

  void start(RequestSpec spec);
  // Sends the second leg of a request that ended well once more, with the handle that it has used: it must fail, and
  // nobody else may notice (I2).
  void replay();
  const Clients& clients() const { return clients_; }
  // The load counters of all workers are back at zero.
  void check_at_rest() const;

 private:
  struct Request : ClientRequest {
    int attempt = 0;
    int prefill = -1;
    int decode = -1;
    LegId prefill_leg;  // 0: none
    LegId decode_leg;
    std::optional<transfer::KvTransferParams> used;  // what the second leg was given
  };
  engine::TokenRequest token_request(const Request& request) const;
  void attempt(Request& request);
  void open_prefill(Request& request, engine::TokenRequest leg);
  void open_decode(Request& request, engine::TokenRequest leg);
  void on_prefill(Request& request, engine::TokenEvent&& event);
  void on_decode(Request& request, engine::TokenEvent&& event);
  static void note_leg(Request& request, int node, bool is_first);
  void leg_ended(Request& request, LegId& leg, int node, const engine::TokenEvent& event);
  void drop_leg(LegId& leg, int node);
  void drop_legs(Request& request);
  void fail_attempt(Request& request, const Error& error);
  void on_cancel(Request& request);
  void on_deadline(Request& request);

  EventQueue& queue_;
  Random& random_;
  Trace& trace_;
  Checker& checker_;
  Legs& legs_;
  Clients clients_;
  const int num_prefill_;
  const int num_decode_;
  const bool all_alike_;
  std::vector<std::unique_ptr<Request>> requests_;
  std::vector<int64_t> load_;  // legs in flight by node: prefill workers, then decode workers
};

}  // namespace tandem::sim
