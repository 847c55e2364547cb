#include "src/sim/clients.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

#include "src/engine/fake_model.h"
#include "src/sim/violation.h"

namespace tandem::sim {

void Clients::arrive(ClientRequest& request, RequestSpec spec, size_t index) {
  request.index = index;
  request.spec = std::move(spec);
  request.expected = engine::FakeModel::generate(request.spec.prompt, request.spec.max_tokens);
  request.start_us = queue_.now_us();
  unfinished_.insert(&request);
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
  unfinished_.erase(&request);
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
  if (request.spec.may_lack_room && error->code == engine::kNoRoom) return;
  check_wait(request, *error, late_us);
  // Without a deadline of its own a reservation waits for prefill only as long as the idle time-out.
  if (!request.spec.tells_deadline && error->kind == ErrorKind::kUnavailable) return;
  if (request.cancelled || late_us >= 0 || !checker_.calm_since(request.start_us)) return;
  throw Violation("no-needless-failure",
                  fmt::format("request {} failed though nothing was wrong: {}", request.index, error->message));
}

// The nodes that it waits for, and those that the requests at these nodes wait for, and so on.
std::vector<int> Clients::nodes_behind(const ClientRequest& request) const {
  std::set<int> nodes(request.nodes.begin(), request.nodes.end());
  for (size_t before = 0; before != nodes.size();) {
    before = nodes.size();
    for (const ClientRequest* other : unfinished_) {
      const bool meets = std::any_of(other->nodes.begin(), other->nodes.end(),
                                     [&nodes](int node) { return nodes.contains(node); });
      if (meets) nodes.insert(other->nodes.begin(), other->nodes.end());
    }
  }
  return {nodes.begin(), nodes.end()};
}

// Who ends at the deadline must have been kept from ending earlier: by work that takes longer, or by what was done to
// the cluster on purpose.
void Clients::check_wait(const ClientRequest& request, const Error& error, int64_t late_us) {
  if (request.cancelled || (late_us < 0 && error.kind != ErrorKind::kDeadlineExceeded)) return;
  ++num_late_;
  const int64_t now_us = queue_.now_us();
  const std::vector<int> nodes = nodes_behind(request);
  // The first leg of a pull may end when nobody waits for it any more: then its blocks stay until the lease is over.
  int64_t unread = 0;
  for (const int node : nodes) unread += checker_.num_unread(node);
  const auto fetches_there = [&nodes](const ClientRequest* open) {
    return open->fetches && std::find(nodes.begin(), nodes.end(), open->nodes.front()) != nodes.end();
  };
  const bool has_orphan = unread > std::count_if(unfinished_.begin(), unfinished_.end(), fetches_there);
  const auto had_orphan_since = [&](int64_t since_us) {
    return has_orphan || std::any_of(nodes.begin(), nodes.end(),
                                     [&](int node) { return checker_.had_orphan_since(node, since_us); });
  };
  // A node may well have had nothing to do before the request came.
  const int64_t still_since_us = now_us - Checker::kStandstillUs;
  if (request.start_us <= still_since_us && !had_orphan_since(still_since_us) && checker_.stand_still(nodes)) {
    throw Violation("standstill",
                    fmt::format("request {} ended at its deadline, and node(s) {} had done nothing for {} us: {}",
                                request.index, fmt::join(nodes, ", "), Checker::kStandstillUs, error.message));
  }
  if (had_orphan_since(request.start_us) || !request.spec.has_time || !checker_.calm_since(request.start_us) ||
      checker_.has_forgotten_since(request.start_us)) {
    return;
  }
  throw Violation("no-needless-wait", fmt::format("request {} ended at its deadline though it had time enough: {}",
                                                  request.index, error.message));
}

void Clients::check_at_rest() const {
  if (!unfinished_.empty()) throw Violation("one-end", fmt::format("{} requests never ended", unfinished_.size()));
}

}  // namespace tandem::sim
