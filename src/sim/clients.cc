#include "src/sim/clients.h"

#include <utility>

#include "src/engine/fake_model.h"
#include "src/sim/violation.h"

namespace tandem::sim {

void Clients::arrive(ClientRequest& request, RequestSpec spec, size_t index) {
  request.index = index;
  request.spec = std::move(spec);
  request.expected = engine::FakeModel::generate(request.spec.prompt, request.spec.max_tokens);
  request.start_us = queue_.now_us();
  ++num_unfinished_;
  trace_.add(What::kArrive, Owner::kNobody, request.index, static_cast<uint64_t>(request.spec.plan));
}

void Clients::take_tokens(ClientRequest& request, int node, const engine::TokenEvent& event) {
  for (const engine::GeneratedToken& token : event.tokens) {
    trace_.add(What::kLegToken, node, request.index, static_cast<uint64_t>(token.token));
    const size_t place = request.tokens.size();
    if (place >= request.expected.size() || token.token != request.expected[place]) {
      throw Violation(
          "exact", fmt::format("request {} on node {}: token {} is {}, its own would be {}", request.index, node, place,
                               token.token, place < request.expected.size() ? request.expected[place] : -1));
    }
    request.tokens.push_back(token.token);
  }
}

void Clients::end(ClientRequest& request, const Error* error) {
  if (request.ended) throw Violation("one-end", fmt::format("request {} ends twice", request.index));
  request.ended = true;
  --num_unfinished_;
  trace_.add(What::kEnd, Owner::kNobody, request.index, error ? 1 + static_cast<uint64_t>(error->kind) : 0);
  if (error == nullptr) {
    ++num_ok_;
    if (request.tokens.size() == request.expected.size()) return;
    throw Violation("exact", fmt::format("request {} ended well with {} of {} tokens", request.index,
                                         request.tokens.size(), request.expected.size()));
  }
  ++num_failed_;
  if (error->message.empty())
    throw Violation("named-error", fmt::format("request {} failed without words", request.index));
  if (error->kind == ErrorKind::kInternal) {
    throw Violation("named-error", fmt::format("request {} failed by a bug: {}", request.index, error->message));
  }
  const int64_t late_us = queue_.now_us() - request.spec.deadline_us;
  if (late_us > kGraceUs) {
    throw Violation("deadline", fmt::format("request {} ended {} us after its deadline", request.index, late_us));
  }
  if (request.spec.may_be_refused && error->kind == ErrorKind::kResourceExhausted) return;
  // Without a deadline of its own a reservation waits for prefill only as long as the idle time-out.
  if (!request.spec.tells_deadline && error->kind == ErrorKind::kUnavailable) return;
  if (request.cancelled || late_us >= 0 || !checker_.calm_since(request.start_us)) return;
  throw Violation("no-needless-failure",
                  fmt::format("request {} failed though nothing was wrong: {}", request.index, error->message));
}

void Clients::check_at_rest() const {
  if (num_unfinished_ != 0) throw Violation("one-end", fmt::format("{} requests never ended", num_unfinished_));
}

}  // namespace tandem::sim
