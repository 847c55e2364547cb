#include "src/router/routed_worker.h"

#include <algorithm>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <charconv>
#include <limits>
#include <nlohmann/json.hpp>

#include "src/base/log.h"

namespace tandem::router {

namespace asio = boost::asio;

namespace {
constexpr int64_t kMaxWeight = 1000;
}

struct RoutedWorker::Timer {
  explicit Timer(asio::io_context& io) : timer(io) {}
  asio::steady_timer timer;
  int64_t armed_us = std::numeric_limits<int64_t>::max();  // when it fires; far away: it is not armed
};

Result<WorkerAddress> parse_worker_address(const std::string& text) {
  WorkerAddress address;
  const size_t hash = text.find('#');
  address.url = text.substr(0, hash);
  TANDEM_TRY(api::parse_http_url(address.url));
  // One spelling: a client names a worker by host:port, and an address that comes again is known as such.
  while (address.url.ends_with('/')) address.url.pop_back();
  if (hash == std::string::npos) return address;
  const char* const end = text.data() + text.size();
  const std::from_chars_result parsed = std::from_chars(text.data() + hash + 1, end, address.weight);
  if (parsed.ec != std::errc() || parsed.ptr != end || address.weight < 1 || address.weight > kMaxWeight) {
    return invalid_argument("url", "the weight in {} must be a number from 1 to {}, as in http://host:port#3", text,
                            kMaxWeight);
  }
  return address;
}

Result<std::unique_ptr<RoutedWorker>> RoutedWorker::create(asio::io_context& io, RouterOptions options,
                                                           Registry& metrics) {
  if (options.decode_urls.empty() && !options.may_begin_without_workers) {
    return invalid_argument("decode", "no decode worker is given; name at least one with --decode URL");
  }
  std::unique_ptr<RoutedWorker> router(new RoutedWorker(io, std::move(options), metrics));
  for (const std::string& address : router->options_.prefill_urls) {
    TANDEM_TRY(router->add_worker(Role::kPrefill, address));
  }
  for (const std::string& address : router->options_.named_prefill_urls) {
    TANDEM_ASSIGN(const WorkerId id, router->add_worker(Role::kPrefill, address));
    router->core_.set_only_named(id);
  }
  for (const std::string& address : router->options_.decode_urls) {
    TANDEM_TRY(router->add_worker(Role::kDecode, address));
  }
  return router;
}

RoutedWorker::RoutedWorker(asio::io_context& io, RouterOptions options, Registry& metrics)
    : io_(io),
      options_(std::move(options)),
      client_(io, {}),
      core_(options_.core, *this, metrics),
      prober_(io, client_, options_.probe_interval,
              [this](WorkerId id, bool success, bool has_answered) {
                core_.probe_result(id, success, now_us(), has_answered);
                settle();
              }),
      timer_(std::make_unique<Timer>(io)) {}

RoutedWorker::~RoutedWorker() { *alive_ = false; }

// ---- Workers -------------------------------------------------------------------------------------------------------

Result<WorkerId> RoutedWorker::add_worker(Role role, const std::string& address, int32_t rank) {
  TANDEM_ASSIGN(const WorkerAddress parsed, parse_worker_address(address));
  TANDEM_ASSIGN(const api::HttpUrl url, api::parse_http_url(parsed.url));
  TANDEM_ASSIGN(const WorkerId id, core_.add_worker(role, parsed.url, parsed.weight, rank));
  if (id.value == std::ssize(remotes_)) {
    remotes_.push_back(std::make_unique<RemoteWorker>(client_, url, options_.worker_api_key));
  }
  prober_.watch(id, url);
  settle();
  return id;
}

Status RoutedWorker::remove_worker(WorkerId id) {
  if (id.value < 0 || id.value >= std::ssize(remotes_) || workers().worker(id).membership == Membership::kRemoved) {
    return make_error(ErrorKind::kNotFound, "there is no worker {}; GET /workers lists them", id);
  }
  core_.drain_worker(id);
  settle();
  return {};
}

void RoutedWorker::set_health(std::span<const WorkerId> ids, bool is_up) {
  core_.set_health(ids, is_up, now_us());
  settle();
}

// ---- Requests ------------------------------------------------------------------------------------------------------

RequestId RoutedWorker::submit(engine::TokenRequest request, engine::EventSink sink) {
  const RequestId id(next_id_.fetch_add(1, std::memory_order_relaxed));
  asio::post(io_, [this, alive = alive_, id, request = std::move(request), sink = std::move(sink)]() mutable {
    if (!*alive) return;
    core_.submit(id, std::move(request), std::move(sink), now_us());
    settle();
  });
  return id;
}

void RoutedWorker::cancel(RequestId id) {
  asio::dispatch(io_, [this, alive = alive_, id] {
    if (!*alive) return;
    if (core_.cancel(id, now_us())) return settle();
    // Called on our own thread this overtakes the posted submit; a second try then comes after it.
    asio::post(io_, [this, alive, id] {
      if (!*alive) return;
      core_.cancel(id, now_us());
      settle();
    });
  });
}

void RoutedWorker::release(const transfer::KvTransferParams& publication) {
  asio::dispatch(io_, [this, alive = alive_, transfer = transfer::to_json(publication).dump()] {
    if (!*alive) return;
    for (const RegisteredWorker& worker : workers().workers()) {
      if (worker.membership != Membership::kRemoved) release(worker.id, transfer);
    }
  });
}

void RoutedWorker::settle() {
  num_requests_.store(core_.num_requests(), std::memory_order_relaxed);
  ready_.store(core_.is_ready(), std::memory_order_relaxed);
  arm_timer();
}

// One timer for all, which may fire early: then it is armed again.
void RoutedWorker::arm_timer() {
  const int64_t next_us = core_.next_tick_us();
  if (next_us >= timer_->armed_us) return;
  timer_->armed_us = next_us;
  timer_->timer.expires_after(std::chrono::microseconds(std::max<int64_t>(0, next_us - now_us())));
  timer_->timer.async_wait([this, alive = alive_](const boost::system::error_code& error) {
    if (error || !*alive) return;
    timer_->armed_us = std::numeric_limits<int64_t>::max();
    core_.tick(now_us());
    settle();
  });
}

// ---- Legs ----------------------------------------------------------------------------------------------------------

void RoutedWorker::open_leg(const LegOrder& order) {
  Leg& leg = legs_[order.id];
  leg.publishes = order.publishes;
  // Rounded up, so that a leg never believes that time is left which is not.
  const int64_t remaining_ms = std::max<int64_t>(1, (order.deadline_us - now_us() + 999) / 1000);
  LegRequest request{order.request, order.transfer, "", remaining_ms, order.publishes};
  if (options_.spans != nullptr && order.request.trace.sampled) {
    leg.span.context = child_of(order.request.trace);
    leg.span.parent = order.request.trace.span_id;
    leg.span.name = role_name(order.role);
    leg.span.is_client = true;
    leg.span.start_us = wall_us(now_us(), now_us());
    leg.span.attributes = {{"server.address", workers().worker(order.worker).url},
                           {"gen_ai.request.id", order.request.external_id}};
    request.traceparent = leg.span.context.traceparent();
  } else if (order.request.trace.is_valid()) {
    request.traceparent = order.request.trace.traceparent();
  }
  leg.call = order.role == Role::kDecode ? open_decode(order.id, order.worker, request)
                                         : open_prefill(order.id, order.worker, request);
}

// A leg that was cancelled may still say that it has published.
api::CallId RoutedWorker::open_decode(LegId id, WorkerId worker, const LegRequest& leg) {
  DecodeHandlers handlers;
  handlers.on_reserved = [this, id](std::string transfer) {
    core_.leg_reserved(id, std::move(transfer), now_us());
    settle();
  };
  handlers.on_event = [this, id, worker](engine::TokenEvent&& event) {
    if (!legs_.contains(id)) {
      if (!event.finish || !event.kv_transfer) return;
      return core_.publication_unwanted(worker, transfer::to_json(*event.kv_transfer).dump());
    }
    if (event.finish) end_leg(id, "");
    core_.leg_event(id, std::move(event), now_us());
    settle();
  };
  handlers.on_failed = [this, id](LegFault fault) {
    client_.cancel(end_leg(id, fault.error.message));  // an error inside the stream does not end the connection
    core_.leg_failed(id, std::move(fault), now_us());
    settle();
  };
  return remotes_[static_cast<size_t>(worker.value)]->start_decode(leg, std::move(handlers));
}

api::CallId RoutedWorker::open_prefill(LegId id, WorkerId worker, const LegRequest& leg) {
  PrefillHandlers handlers;
  handlers.on_done = [this, id, worker](std::string transfer) {
    if (!legs_.contains(id)) {
      if (!transfer.empty()) core_.publication_unwanted(worker, transfer);
      return;
    }
    end_leg(id, "");
    core_.leg_done(id, std::move(transfer), now_us());
    settle();
  };
  handlers.on_failed = [this, id](LegFault fault) {
    end_leg(id, fault.error.message);
    core_.leg_failed(id, std::move(fault), now_us());
    settle();
  };
  return remotes_[static_cast<size_t>(worker.value)]->start_prefill(leg, std::move(handlers));
}

api::CallId RoutedWorker::end_leg(LegId id, std::string error) {
  auto leg = legs_.extract(id);
  if (leg.empty()) return {};
  Span& span = leg.mapped().span;
  if (span.context.is_valid()) {
    span.end_us = wall_us(now_us(), now_us());
    span.error = std::move(error);
    options_.spans->add(std::move(span));
  }
  return leg.mapped().call;
}

// Prefill's answer may cross the cancel. Then it is still read, since nobody else knows what it has published.
void RoutedWorker::cancel_leg(LegId id) {
  const auto found = legs_.find(id);
  if (found == legs_.end()) return;
  const bool publishes = found->second.publishes;
  const api::CallId call = end_leg(id, "cancelled");
  publishes ? client_.leave(call, kLeaveTimeout) : client_.cancel(call);
}

void RoutedWorker::release(WorkerId worker, const std::string& transfer) {
  if (num_releases_ >= kMaxReleases) {
    log_warning("router", "{} releases of publications are under way; one more is left to its lease", num_releases_);
    return;
  }
  ++num_releases_;
  remotes_[static_cast<size_t>(worker.value)]->release(transfer, [this] { --num_releases_; });
}

}  // namespace tandem::router
