#include "src/commands/node_front_end.h"

#include <random>
#include <utility>

#include "src/api/api_error.h"
#include "src/base/log.h"
#include "src/commands/server_common.h"
#include "src/group/node.h"

namespace tandem::commands {
namespace {

constexpr std::chrono::milliseconds kProbeInterval{5'000};
constexpr std::chrono::milliseconds kLoadTimeout{5'000};  // of rank 0, to show the loads
// Ranks load their weights again after a restart, and requests wait for them.
constexpr int64_t kRescueUs = 60'000'000;

// A part of a bound that holds for all front ends together.
template <typename Number>
void share(Number& bound, int64_t count) {
  bound = static_cast<Number>((static_cast<int64_t>(bound) + count - 1) / count);
}

}  // namespace

NodeFrontEnd::NodeFrontEnd(boost::asio::io_context& io, const NodeFrontEndOptions& options)
    : options_(options), client_(io, {}) {}

NodeFrontEnd::~NodeFrontEnd() = default;

Result<std::unique_ptr<NodeFrontEnd>> NodeFrontEnd::open(boost::asio::io_context& io, const NodeFrontEndOptions& options,
                                                         int64_t number, NodeFrontEnd* first, const Clock& clock,
                                                         Registry& metrics) {
  std::unique_ptr<NodeFrontEnd> front_end(new NodeFrontEnd(io, options));
  TANDEM_TRY(front_end->start(io, number, first, clock, metrics));
  return front_end;
}

Status NodeFrontEnd::start(boost::asio::io_context& io, int64_t number, NodeFrontEnd* first, const Clock& clock,
                           Registry& metrics) {
  const Options& options = options_.options;
  const NodeConfig& config = options_.config;
  router::RouterOptions routing;
  routing.may_begin_without_workers = true;
  routing.spans = options_.spans;
  routing.core.rescue_us = kRescueUs;
  routing.core.registry.decode_policy = router::PolicyKind::kPrefixAware;  // each rank has a cache of its own
  const bool passes_transfers = !options.text("kv-transfer-config").empty();
  routing.core.passes_transfers = passes_transfers;
  if (options_.count > 1) routing.core.front_end = std::to_string(number);
  share(routing.core.max_requests, options_.count);
  share(routing.core.queue_size, options_.count);
  // The coordinator tells what becomes of ranks; probes only guard against one whose endpoint hangs.
  if (config.hosts_coordinator) routing.probe_interval = kProbeInterval;
  routing.core.registry.seed = std::random_device{}();
  const std::vector<std::string>& keys = options.list("api-key");
  if (!keys.empty()) routing.worker_api_key = keys.front();
  TANDEM_ASSIGN(router_, router::RoutedWorker::create(io, std::move(routing), metrics));

  api::FrontendOptions front = frontend_options(options, options_.served.model.names.front());
  front.policy.accepts_kv_transfer = passes_transfers;
  front.first_rank = config.serves_node_only ? config.first_rank : 0;
  front.num_ranks = config.serves_node_only ? config.num_ranks : config.shape.data;
  front.spans = options_.spans;
  front.health = [this] { return health(); };
  front.server_load = options_.num_requests;
  share(front.max_concurrent_requests, options_.count);
  frontend_ = std::make_unique<api::Frontend>(io, std::move(front), clock, metrics);
  api::HttpServerOptions http = frontend_->http_options();
  share(http.max_connections, options_.count);
  share(http.max_total_body_bytes, options_.count);
  if (first == nullptr) {
    TANDEM_ASSIGN(server_, api::HttpServer::listen(io, options.text("host"), static_cast<uint16_t>(options.integer("port")),
                                                   std::move(http)));
  } else {
    TANDEM_ASSIGN(server_, api::HttpServer::share(io, *first->server_, std::move(http)));
  }
  frontend_->add_routes(*server_);
  server_->add_route({"GET", "/expert_load", true, [this](std::shared_ptr<api::HttpExchange> exchange) {
                        show_expert_load(std::move(exchange));
                      }});
  server_->start();
  frontend_->open(options_.served, *router_);
  return {};
}

Status NodeFrontEnd::add_rank(int32_t rank, const std::string& url) {
  const Result<router::WorkerId> id = router_->add_worker(router::Role::kDecode, url, rank);
  return id.ok() ? Status() : Status(id.error());
}

void NodeFrontEnd::take_status(const group::GroupStatus& status) {
  status_ = status;
  for (const group::MemberStatus& member : status.members) {
    if (is_served_here(member)) take_member(member);
  }
  std::vector<router::WorkerId> ids;
  for (const auto& [rank, worker] : workers_) ids.push_back(worker.id);
  router_->set_health(ids, status.standing);
}

// Only the first of the tensor ranks of a data rank has an endpoint.
bool NodeFrontEnd::is_served_here(const group::MemberStatus& member) const {
  return !member.http_address.empty() && (!options_.config.serves_node_only || member.node == group::this_node());
}

// A rank that was restarted has another port.
void NodeFrontEnd::take_member(const group::MemberStatus& member) {
  const std::string url = "http://" + member.http_address;
  const auto found = workers_.find(member.rank);
  if (found != workers_.end() && found->second.url == url) return;
  if (found != workers_.end()) {
    // Its requests have failed already, with its process.
    if (const Status removed = router_->remove_worker(found->second.id); !removed.ok()) {
      log_warning("serve", "{}", removed.error().message);
    }
    workers_.erase(found);
  }
  const int32_t data_rank = member.rank.value / options_.config.shape.tensor;
  const Result<router::WorkerId> id = router_->add_worker(router::Role::kDecode, url, data_rank);
  if (!id.ok()) return log_error("serve", "rank {} at {}: {}", member.rank, url, id.error().message);
  workers_[member.rank] = {url, *id};
}

// Live: this answers at all. Ready: 200. Degraded: the group has stood and does not now.
api::Health NodeFrontEnd::health() const {
  if (!options_.config.hosts_coordinator) {
    return router_->is_ready() ? api::Health{true, "ok", std::nullopt} : api::Health{false, "no rank", std::nullopt};
  }
  if (status_.standing && router_->is_ready()) return {true, "ok", std::nullopt};
  const char* const state = status_.formations > 0 ? "degraded" : "loading";
  return {false, fmt::format("{}: {}", state, status_.standing ? "ranks answer soon" : status_.text), std::nullopt};
}

// What rank 0 says of the whole group.
void NodeFrontEnd::show_expert_load(std::shared_ptr<api::HttpExchange> exchange) {
  const auto rank_0 = workers_.find(group::RankId(0));
  if (rank_0 == workers_.end()) {
    const char* const why = options_.config.hosts_coordinator
                                ? "rank 0, which gathers the loads of the group, is not there yet"
                                : "rank 0, which gathers the loads of the group, is behind the first node's endpoint; ask there";
    return exchange->respond(api::error_response(make_error(ErrorKind::kUnavailable, "{}", why)));
  }
  api::ClientRequest request;
  request.target = "/expert_load";
  request.total_timeout = kLoadTimeout;
  if (const std::vector<std::string>& keys = options_.options.list("api-key"); !keys.empty()) {
    request.headers.emplace_back("Authorization", "Bearer " + keys.front());
  }
  const Result<api::HttpUrl> url = api::parse_http_url(rank_0->second.url);
  if (!url.ok()) return exchange->respond(api::error_response(url.error()));
  client_.start(*url, std::move(request), {.on_done = [exchange](Result<api::ClientResponse> answer) {
                  if (!answer.ok()) return exchange->respond(api::error_response(answer.error()));
                  api::HttpResponse response;
                  response.status = answer->status;
                  response.body = std::move(answer->body);
                  exchange->respond(std::move(response));
                }});
}

void NodeFrontEnd::drain(const Error& why) { frontend_->drain(why); }

void NodeFrontEnd::close(const Error& why) { frontend_->close(why); }

}  // namespace tandem::commands
