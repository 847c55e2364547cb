// One request inside a RouterCore.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "src/engine/worker.h"
#include "src/router/router_core.h"

namespace tandem::router {

struct RouterCore::Routed {
  Routed(RequestId its_id, engine::TokenRequest its_request, engine::EventSink its_sink, Repeats repeats)
      : id(its_id),
        request(std::move(its_request)),
        sink(std::move(its_sink)),
        legs(repeats, request.kv_transfer ? transfer::to_json(*request.kv_transfer).dump() : ""),
        emitted(request.resumed) {}

  RequestId id;
  engine::TokenRequest request;
  engine::EventSink sink;
  TwoLegs legs;
  std::vector<uint64_t> prompt_blocks;
  std::vector<TokenId> emitted;                      // what a migration goes on behind; the caller's own first
  std::optional<engine::TokenUsage> usage;           // of the first event: what the client has been told
  std::vector<std::pair<WorkerId, int64_t>> failed;  // workers that failed this request, and when
  uint64_t session = 0;

  LegId decode_leg;  // 0: none
  LegId prefill_leg;
  LoadToken decode_load;
  LoadToken prefill_load;
  WorkerId decode_worker{-1};  // whose load it is; -1: none
  WorkerId prefill_worker{-1};

  std::optional<std::pair<WorkerId, ErrorKind>> last_fault;  // of a leg; what comes of it has not been counted yet

  bool is_started = false;
  bool needs_no_transfer = false;  // a worker had no room for one
  bool is_attempt_free = false;    // the attempt to come follows no failure
  int64_t deadline_us = 0;
  int64_t timer_us = 0;         // its entry in timers_; 0: none
  int64_t park_until_us = 0;    // 0: not parked
  bool is_repeat_paid = false;  // the attempt to come has been taken from the budget
  int64_t arrived_us = 0;
  int64_t attempt_us = 0;   // start of the present attempt
  int64_t reserved_us = 0;  // of it; 0: not yet
  int64_t prefilled_us = 0;

  int64_t prompt_tokens() const { return std::ssize(request.prompt); }
  LegId& leg(Role role) { return role == Role::kDecode ? decode_leg : prefill_leg; }
  WorkerId& load_worker(Role role) { return role == Role::kDecode ? decode_worker : prefill_worker; }
  LoadToken& load(Role role) { return role == Role::kDecode ? decode_load : prefill_load; }
};

}  // namespace tandem::router
