#include "src/sim/router.h"

#include <utility>

#include "src/sim/violation.h"

namespace tandem::sim {

using engine::TokenEvent;
using engine::TokenRequest;

Router::Router(EventQueue& queue, Random& random, Trace& trace, Checker& checker, Legs& legs, int num_prefill,
               int num_decode, bool all_alike)
    : queue_(queue),
      random_(random),
      trace_(trace),
      checker_(checker),
      legs_(legs),
      clients_(queue, trace, checker),
      num_prefill_(num_prefill),
      num_decode_(num_decode),
      all_alike_(all_alike),
      load_(static_cast<size_t>(num_prefill + num_decode), 0) {}

void Router::start(RequestSpec spec) {
  requests_.push_back(std::make_unique<Request>());
  Request& request = *requests_.back();
  clients_.arrive(request, std::move(spec), requests_.size() - 1);
  if (request.spec.cancel_at_us != 0) {
    queue_.add(request.spec.cancel_at_us, {}, [this, &request] { on_cancel(request); });
  }
  queue_.add(request.spec.deadline_us + Clients::kGraceUs, {}, [this, &request] { on_deadline(request); });
  attempt(request);
}

TokenRequest Router::token_request(const Request& request) const {
  TokenRequest leg;
  leg.prompt = request.spec.prompt;
  leg.sampling.max_tokens = request.spec.max_tokens;
  leg.sampling.temperature = 0;
  if (request.spec.tells_deadline) leg.deadline_us = request.spec.deadline_us;
  return leg;
}

void Router::attempt(Request& request) {
  ++request.attempt;
  const RequestSpec& spec = request.spec;
  const int any = num_prefill_ + num_decode_;
  const auto draw = [this](int count) { return static_cast<int>(random_.below(static_cast<size_t>(count))); };
  request.prefill = spec.prefill >= 0 ? spec.prefill : draw(all_alike_ ? any : num_prefill_);
  request.decode = spec.decode >= 0 ? num_prefill_ + spec.decode
                   : all_alike_     ? draw(any)
                                    : num_prefill_ + draw(num_decode_);
  TokenRequest leg = token_request(request);
  switch (spec.plan) {
    case Plan::kPush:
      leg.kv_transfer.emplace();
      leg.kv_transfer->do_remote_prefill = true;
      leg.kv_transfer->mode = transfer::TransferMode::kPush;
      return open_decode(request, std::move(leg));
    case Plan::kPull:
      leg.kv_transfer.emplace();
      leg.kv_transfer->do_remote_decode = true;
      leg.sampling.max_tokens = 1;
      return open_prefill(request, std::move(leg));
    case Plan::kLocal:
      return open_decode(request, std::move(leg));
  }
}

void Router::replay() {
  if (requests_.empty()) return;
  const Request& request = *requests_[random_.below(requests_.size())];
  if (!request.ended || request.tokens.size() != request.expected.size() || !request.used) return;
  const int node = request.spec.plan == Plan::kPush ? request.prefill : request.decode;
  TokenRequest leg = token_request(request);
  leg.kv_transfer = request.used;
  leg.deadline_us = queue_.now_us() + Clients::kGraceUs;
  trace_.add(What::kReplay, node, request.index);
  legs_.open(node, std::move(leg), [this, node, index = request.index](TokenEvent&& event) {
    if (!event.tokens.empty() || event.finish) {
      throw Violation("handle-used-once", fmt::format("the handle of request {} worked again on node {}", index, node));
    }
    if (event.error) trace_.add(What::kLegEnd, node, index, 1 + static_cast<uint64_t>(event.error->kind));
  });
}

// ---- Legs ----------------------------------------------------------------------------------------------------------

void Router::open_prefill(Request& request, TokenRequest leg) {
  ++load_[static_cast<size_t>(request.prefill)];
  note_leg(request, request.prefill, request.spec.plan == Plan::kPull);
  trace_.add(What::kLeg, request.prefill, request.index, 1);
  request.prefill_leg = legs_.open(request.prefill, std::move(leg),
                                   [this, &request](TokenEvent&& event) { on_prefill(request, std::move(event)); });
}

void Router::open_decode(Request& request, TokenRequest leg) {
  ++load_[static_cast<size_t>(request.decode)];
  note_leg(request, request.decode, request.spec.plan != Plan::kPull);
  trace_.add(What::kLeg, request.decode, request.index, 0);
  request.decode_leg = legs_.open(request.decode, std::move(leg),
                                  [this, &request](TokenEvent&& event) { on_decode(request, std::move(event)); });
}

// The first leg of a push is decode's, that of a pull prefill's.
void Router::note_leg(Request& request, int node, bool is_first) {
  if (is_first) request.nodes.clear();
  request.nodes.push_back(node);
  request.fetches = !is_first && request.spec.plan == Plan::kPull;
}

void Router::leg_ended(Request& request, LegId& leg, int node, const TokenEvent& event) {
  leg = LegId();
  --load_[static_cast<size_t>(node)];
  trace_.add(What::kLegEnd, node, request.index, event.error ? 1 + static_cast<uint64_t>(event.error->kind) : 0);
}

void Router::drop_leg(LegId& leg, int node) {
  if (leg == LegId()) return;
  legs_.cancel(std::exchange(leg, LegId()));
  --load_[static_cast<size_t>(node)];
}

void Router::drop_legs(Request& request) {
  drop_leg(request.prefill_leg, request.prefill);
  drop_leg(request.decode_leg, request.decode);
}

void Router::on_prefill(Request& request, TokenEvent&& event) {
  for (const engine::GeneratedToken& token : event.tokens) {
    if (token.token != request.expected.front()) {
      throw Violation("exact", fmt::format("request {}: prefill's first token is {} instead of {}", request.index,
                                           token.token, request.expected.front()));
    }
  }
  if (!event.finish && !event.error) return;
  leg_ended(request, request.prefill_leg, request.prefill, event);
  if (request.ended) return;
  if (event.error) {
    // Once decode has begun it has all it needs.
    if (request.tokens.empty()) fail_attempt(request, *event.error);
    return;
  }
  if (request.spec.plan != Plan::kPull) return;
  if (!event.kv_transfer) throw Violation("protocol", "a prefill leg ended without kv_transfer_params");
  TokenRequest leg = token_request(request);
  leg.kv_transfer = std::move(event.kv_transfer);
  request.used = leg.kv_transfer;
  open_decode(request, std::move(leg));
}

void Router::on_decode(Request& request, TokenEvent&& event) {
  clients_.take_tokens(request, request.decode, event);
  const bool last = event.finish || event.error;
  if (last) leg_ended(request, request.decode_leg, request.decode, event);
  if (request.ended) return;
  if (event.error) return fail_attempt(request, *event.error);
  if (last) return clients_.end(request, nullptr);
  if (!event.kv_transfer) return;
  TokenRequest leg = token_request(request);
  leg.kv_transfer = std::move(event.kv_transfer);
  request.used = leg.kv_transfer;
  open_prefill(request, std::move(leg));
}

// ---- Ends ----------------------------------------------------------------------------------------------------------

void Router::fail_attempt(Request& request, const Error& error) {
  drop_legs(request);
  if (error.code == engine::kNoRoom && request.spec.plan != Plan::kLocal) {
    request.spec.plan = Plan::kLocal;
    request.used.reset();
    return attempt(request);
  }
  const bool may_retry =
      request.tokens.empty() && request.attempt < request.spec.attempts && queue_.now_us() < request.spec.deadline_us;
  // Without trouble on the way an attempt has no right to fail, also if the next one would succeed.
  if (!may_retry || checker_.calm_since(request.start_us)) return clients_.end(request, &error);
  trace_.add(What::kRetry, Owner::kNobody, request.index);
  const int attempt_number = request.attempt;
  queue_.add(queue_.now_us() + random_.range(1'000, 50'000), {}, [this, &request, attempt_number] {
    if (!request.ended && request.attempt == attempt_number) attempt(request);
  });
}

void Router::on_cancel(Request& request) {
  if (request.ended) return;
  trace_.add(What::kCancel, Owner::kNobody, request.index);
  request.cancelled = true;
  // Other people's routers may forget one leg; then its worker hears of the end from the other side of the transfer.
  const size_t forgets = random_.below(4);
  const bool leaves_one =
      (forgets == 0 && request.prefill_leg != LegId()) || (forgets == 1 && request.decode_leg != LegId());
  if (leaves_one) checker_.forget_leg(request.spec.deadline_us + Checker::kStandstillUs);
  if (forgets != 0) drop_leg(request.prefill_leg, request.prefill);
  if (forgets != 1) drop_leg(request.decode_leg, request.decode);
  const Error left = make_error(ErrorKind::kAborted, "the client has left");
  clients_.end(request, &left);
}

// Also drops a prefill leg that is still open after the answer.
void Router::on_deadline(Request& request) {
  drop_legs(request);
  if (request.ended) return;
  if (request.spec.tells_deadline && checker_.calm_since(request.start_us)) {
    throw Violation("deadline", fmt::format("no worker ended request {} at its deadline", request.index));
  }
  const Error late = make_error(ErrorKind::kDeadlineExceeded, "the workers were silent past the deadline");
  clients_.end(request, &late);
}

void Router::check_at_rest() const {
  clients_.check_at_rest();
  for (size_t node = 0; node < load_.size(); ++node) {
    if (load_[node] != 0) throw Violation("at-rest", fmt::format("load counter of node {}: {}", node, load_[node]));
  }
}

}  // namespace tandem::sim
