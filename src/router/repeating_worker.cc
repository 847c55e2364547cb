#include "src/router/repeating_worker.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <map>
#include <utility>
#include <vector>

#include "src/base/log.h"

namespace tandem::router {
namespace {

constexpr const char* kCopies = "tandem:router_copies_total";
constexpr const char* kCopiesHelp = "Copies of requests for --repeat-d-times by how their answers compare.";

// A request with its copies.
struct Original {
  RequestId id;
  engine::TokenRequest request;
  std::vector<TokenId> tokens;
  bool has_ended = false;
  bool has_failed = false;
  bool is_cancelled = false;
  std::vector<RequestId> copies;                 // that run
  std::vector<std::vector<TokenId>> early_ends;  // answers of copies that ended before it
  int64_t num_open = 0;
  int64_t num_same = 0;
  int64_t num_different = 0;
  int64_t num_failed = 0;
};

}  // namespace

struct RepeatingWorker::Impl : std::enable_shared_from_this<Impl> {
  Impl(boost::asio::io_context& context, engine::Worker& behind, int64_t number, Registry& registry)
      : io(context),
        inner(behind),
        copies(number),
        same(registry.counter(kCopies, kCopiesHelp, {{"outcome", "same"}})),
        different(registry.counter(kCopies, kCopiesHelp, {{"outcome", "different"}})),
        failed(registry.counter(kCopies, kCopiesHelp, {{"outcome", "failed"}})) {}

  void take(const std::shared_ptr<Original>& original, const engine::TokenEvent& event) {
    const bool is_first = original->tokens.empty() && !event.tokens.empty();
    for (const engine::GeneratedToken& token : event.tokens) original->tokens.push_back(token.token);
    original->has_failed = event.error.has_value();
    original->has_ended = event.error || event.finish;
    if (is_first) {
      // Not from inside an event: a sink may not call its worker.
      boost::asio::post(io, [weak = weak_from_this(), original] {
        if (const std::shared_ptr<Impl> self = weak.lock()) self->start_copies(original);
      });
    }
    if (!original->has_ended) return;
    for (const std::vector<TokenId>& tokens : std::exchange(original->early_ends, {})) compare(*original, tokens);
    report(*original);
    originals.erase(original->id);
  }

  void start_copies(const std::shared_ptr<Original>& original) {
    if (original->is_cancelled) return;
    original->num_open = copies;
    for (int64_t i = 0; i < copies; ++i) {
      engine::TokenRequest copy = original->request;
      copy.external_id += fmt::format("-copy{}", i + 1);
      copy.trace = {};
      const auto tokens = std::make_shared<std::vector<TokenId>>();
      const auto sink = [weak = weak_from_this(), original, tokens](engine::TokenEvent&& event) {
        for (const engine::GeneratedToken& token : event.tokens) tokens->push_back(token.token);
        const std::shared_ptr<Impl> self = weak.lock();
        if (self && (event.finish || event.error)) self->end_copy(*original, event.error, std::move(*tokens));
      };
      original->copies.push_back(inner.submit(std::move(copy), sink));
    }
  }

  void end_copy(Original& original, const std::optional<Error>& error, std::vector<TokenId> tokens) {
    --original.num_open;
    if (error) {
      log_warning("repeat", "[{}] a copy failed: {}", original.request.external_id, error->message);
      failed.add();
      ++original.num_failed;
    } else if (original.has_ended) {
      compare(original, tokens);
    } else {
      original.early_ends.push_back(std::move(tokens));
    }
    report(original);
  }

  // With an answer that failed there is nothing to compare.
  void compare(Original& original, const std::vector<TokenId>& tokens) {
    if (original.has_failed) {
      failed.add();
      ++original.num_failed;
      return;
    }
    const bool is_same = tokens == original.tokens;
    (is_same ? same : different).add();
    ++(is_same ? original.num_same : original.num_different);
  }

  void report(const Original& original) {
    if (!original.has_ended || original.num_open > 0) return;
    if (original.num_same + original.num_different + original.num_failed < copies) return;  // they have not begun
    log_info("repeat", "[{}] benchmark: {} copies, {} like the answer, {} not, {} failed", original.request.external_id,
             copies, original.num_same, original.num_different, original.num_failed);
  }

  boost::asio::io_context& io;
  engine::Worker& inner;
  const int64_t copies;
  Counter& same;
  Counter& different;
  Counter& failed;
  std::map<RequestId, std::shared_ptr<Original>> originals;  // that run
};

RepeatingWorker::RepeatingWorker(boost::asio::io_context& io, engine::Worker& inner, int64_t copies, Registry& metrics)
    : impl_(std::make_shared<Impl>(io, inner, copies, metrics)) {}

RepeatingWorker::~RepeatingWorker() = default;

RequestId RepeatingWorker::submit(engine::TokenRequest request, engine::EventSink sink) {
  const auto original = std::make_shared<Original>();
  original->request = request;
  const std::weak_ptr<Impl> weak(impl_);
  original->id = impl_->inner.submit(
      std::move(request), [weak, original, sink = std::move(sink)](engine::TokenEvent&& event) {
        if (const std::shared_ptr<Impl> self = weak.lock()) self->take(original, event);
        sink(std::move(event));
      });
  impl_->originals.emplace(original->id, original);
  return original->id;
}

void RepeatingWorker::release(const transfer::KvTransferParams& publication) { impl_->inner.release(publication); }

void RepeatingWorker::cancel(RequestId id) {
  impl_->inner.cancel(id);
  const auto found = impl_->originals.find(id);
  if (found == impl_->originals.end()) return;
  found->second->is_cancelled = true;
  for (const RequestId copy : found->second->copies) impl_->inner.cancel(copy);
  impl_->originals.erase(found);
}

}  // namespace tandem::router
