#include "src/commands/serve_node.h"

#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <map>
#include <memory>
#include <random>

#include "src/api/frontend.h"
#include "src/api/http_server.h"
#include "src/base/log.h"
#include "src/base/version.h"
#include "src/cluster/process.h"
#include "src/cluster/rank_processes.h"
#include "src/comm/address.h"
#include "src/comm/meeting.h"
#include "src/commands/serve_text.h"
#include "src/commands/server_common.h"
#include "src/group/coordinator.h"
#include "src/group/node.h"
#include "src/router/routed_worker.h"

namespace tandem::commands {
namespace {

namespace asio = boost::asio;

constexpr std::chrono::milliseconds kDrainTime{2'000};  // running answers may go on this long after SIGTERM
constexpr std::chrono::milliseconds kDrainCheck{20};
constexpr std::chrono::milliseconds kProbeInterval{5'000};
// Ranks load their weights again after a restart, and requests wait for them.
constexpr int64_t kRescueUs = 60'000'000;

// The address of this machine that faces `host`: ranks listen there, so that the front end of another node finds them.
Result<std::string> own_address_facing(const std::string& host) {
  TANDEM_ASSIGN(const comm::SocketAddress peer, comm::look_up_address(host, 1));
  const int fd = ::socket(peer.get()->sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  comm::SocketAddress own;
  own.length = sizeof own.storage;
  const bool found = fd >= 0 && ::connect(fd, peer.get(), peer.length) == 0 &&
                     ::getsockname(fd, reinterpret_cast<sockaddr*>(&own.storage), &own.length) == 0;
  if (fd >= 0) ::close(fd);
  if (!found) {
    return invalid_argument("data-parallel-address", "no way leads from here to --data-parallel-address {}", host);
  }
  const std::string text = own.to_string();
  return text.substr(0, text.rfind(':'));
}

Result<int64_t> find_free_port(const std::string& host) {
  TANDEM_ASSIGN(const comm::SocketAddress address, comm::look_up_address(host, 0));
  TANDEM_ASSIGN(const int fd, comm::open_listener(address, "a rank of this node", "--data-parallel-address"));
  comm::SocketAddress own;
  own.length = sizeof own.storage;
  const bool found = ::getsockname(fd, reinterpret_cast<sockaddr*>(&own.storage), &own.length) == 0;
  ::close(fd);
  CHECK(found);
  return own.port();
}

// Everything that this node's ranks are told besides what the user said.
std::vector<cluster::RankProcess> plan_ranks(const Options& options, const NodeConfig& config, const std::string& host,
                                             const std::vector<int64_t>& ports, int64_t coordinator_port) {
  static constexpr std::array<std::string_view, 6> kOwn{"host", "port", "log-name", "otlp-endpoint", "config", "secret-config"};
  std::vector<cluster::RankProcess> ranks;
  for (int32_t rank = config.first_rank; rank < config.first_rank + config.num_ranks; ++rank) {
    cluster::RankProcess process;
    process.rank = rank;
    process.arguments = {"serve"};
    const std::vector<std::string> given = options.set_arguments(kRankOptionGroup, kOwn);
    process.arguments.insert(process.arguments.end(), given.begin(), given.end());
    const std::vector<std::string> own = {
        "--host", host, "--port", std::to_string(ports[static_cast<size_t>(rank - config.first_rank)]), "--log-name",
        fmt::format("rank{}", rank)};
    process.arguments.insert(process.arguments.end(), own.begin(), own.end());
    const std::vector<std::string> of_group =
        rank_arguments(options, config.shape, rank, config.coordinator_host, coordinator_port);
    process.arguments.insert(process.arguments.end(), of_group.begin(), of_group.end());
    ranks.push_back(std::move(process));
  }
  return ranks;
}

class NodeServer {
 public:
  NodeServer(const Options& options, const NodeConfig& config) : options_(options), config_(config) {}

  Status run() {
    // The ranks check the options again; here a fault is told before anything is started.
    TANDEM_ASSIGN(RankConfig rank_config, make_rank_config(options_));
    if (config_.has_front_end) {
      TANDEM_ASSIGN(served_, load_served_text(options_, rank_config));
    }
    TANDEM_ASSIGN(exporter_, open_exporter(options_, "tandem-serve", io_, metrics_));
    int64_t coordinator_port = config_.coordinator_port;
    if (config_.has_front_end) TANDEM_TRY(open_front_end());
    if (config_.hosts_coordinator) {
      TANDEM_TRY(open_coordinator());
      coordinator_port = coordinator_->port();
    }
    TANDEM_ASSIGN(const std::string host, own_address_facing(config_.coordinator_host));
    std::vector<int64_t> ports(static_cast<size_t>(config_.num_ranks), 0);  // any; the coordinator hears which
    if (router_ != nullptr && !config_.hosts_coordinator) TANDEM_TRY(choose_ports(host, ports));
    ranks_ = std::make_unique<cluster::RankProcesses>(io_, cluster::kOwnProgram,
                                                      plan_ranks(options_, config_, host, ports, coordinator_port),
                                                      [this](const Error& why) { give_up(why); });
    signals_.async_wait([this](const boost::system::error_code& error, int signal) {
      if (!error) shut_down(signal);
    });
    TANDEM_TRY(ranks_->start());
    io_.run();
    if (frontend_ != nullptr) frontend_->close(make_error(ErrorKind::kUnavailable, "the server is shutting down"));
    return fault_ ? Status(*fault_) : Status();
  }

 private:
  Status open_front_end() {
    if (const int64_t count = options_.integer("api-server-count"); count > 1) {
      log_info("serve", "--api-server-count {}: one front end serves all ranks", count);
    }
    router::RouterOptions routing;
    routing.may_begin_without_workers = true;
    routing.spans = exporter_.get();
    routing.core.rescue_us = kRescueUs;
    // The coordinator tells what becomes of ranks; probes only guard against one whose endpoint hangs.
    if (config_.hosts_coordinator) routing.probe_interval = kProbeInterval;
    routing.core.registry.seed = std::random_device{}();
    const std::vector<std::string>& keys = options_.list("api-key");
    if (!keys.empty()) routing.worker_api_key = keys.front();
    TANDEM_ASSIGN(router_, router::RoutedWorker::create(io_, std::move(routing), metrics_));

    api::FrontendOptions front = frontend_options(options_, served_.model.names.front());
    front.policy.accepts_kv_transfer = front.policy.accepts_resumed = false;
    front.first_rank = config_.serves_node_only ? config_.first_rank : 0;
    front.num_ranks = config_.serves_node_only ? config_.num_ranks : config_.shape.data;
    front.spans = exporter_.get();
    front.health = [this] { return health(); };
    frontend_ = std::make_unique<api::Frontend>(io_, std::move(front), clock_, metrics_);
    TANDEM_ASSIGN(server_,
                  api::HttpServer::listen(io_, options_.text("host"), static_cast<uint16_t>(options_.integer("port")),
                                          frontend_->http_options()));
    frontend_->add_routes(*server_);
    server_->start();
    frontend_->open(served_, *router_);
    log_info("serve", "serving {} on http://{}:{} with {} ranks", served_.model.names.front(), options_.text("host"),
             server_->port(), config_.shape.data);
    return {};
  }

  // A node with an endpoint but without the coordinator knows where its ranks listen only if it says so itself.
  Status choose_ports(const std::string& host, std::vector<int64_t>& ports) {
    for (size_t i = 0; i < ports.size(); ++i) {
      TANDEM_ASSIGN(ports[i], find_free_port(host));
      const int32_t rank = config_.first_rank + static_cast<int32_t>(i);
      const std::string url = fmt::format("http://{}:{}", host, ports[i]);
      TANDEM_TRY(router_->add_worker(router::Role::kDecode, url, rank));
    }
    return {};
  }

  Status open_coordinator() {
    group::CoordinatorOptions options;
    options.host = config_.coordinator_host;
    options.port = config_.coordinator_port;
    options.shape = config_.shape;
    options.rank_timeout_us = config_.rank_timeout_us;
    TANDEM_ASSIGN(coordinator_, group::Coordinator::listen(options, [this](const group::GroupStatus& status) {
                    asio::post(io_, [this, status] { take_status(status); });
                  }));
    log_info("serve", "ranks meet at {}:{}", config_.coordinator_host, coordinator_->port());
    return {};
  }

  // The front end sends requests to the ranks of the group as it is now.
  void take_status(const group::GroupStatus& status) {
    status_ = status;
    for (const group::MemberStatus& member : status.members) {
      if (status.standing) ranks_->mark_ready(data_rank(member));
      if (router_ != nullptr && is_served_here(member)) take_member(member);
    }
    if (router_ == nullptr) return;
    std::vector<router::WorkerId> ids;
    for (const auto& [rank, worker] : workers_) ids.push_back(worker.id);
    router_->set_health(ids, status.standing);
  }

  int32_t data_rank(const group::MemberStatus& member) const { return member.rank.value / config_.shape.tensor; }

  // Only the first of the tensor ranks has an endpoint.
  bool is_served_here(const group::MemberStatus& member) const {
    return !member.http_address.empty() && (!config_.serves_node_only || member.node == group::this_node());
  }

  // A rank that was restarted has another port.
  void take_member(const group::MemberStatus& member) {
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
    const Result<router::WorkerId> id = router_->add_worker(router::Role::kDecode, url, data_rank(member));
    if (!id.ok()) return log_error("serve", "rank {} at {}: {}", member.rank, url, id.error().message);
    workers_[member.rank] = {url, *id};
  }

  // Live: this answers at all. Ready: 200. Degraded: the group has stood and does not now.
  api::Health health() const {
    if (!config_.hosts_coordinator) {
      return router_->is_ready() ? api::Health{true, "ok", std::nullopt} : api::Health{false, "no rank", std::nullopt};
    }
    if (status_.standing && router_->is_ready()) return {true, "ok", std::nullopt};
    const char* const state = status_.formations > 0 ? "degraded" : "loading";
    return {false, fmt::format("{}: {}", state, status_.standing ? "ranks answer soon" : status_.text), std::nullopt};
  }

  void give_up(const Error& why) {
    fault_ = why;
    stop();
  }

  void shut_down(int signal) {
    log_info("serve", "{}: shutting down", signal == SIGINT ? "interrupted" : "terminated");
    if (server_ == nullptr) return stop();
    server_->drain([] {});
    drain_until_ = std::chrono::steady_clock::now() + kDrainTime;
    stop_when_idle();
  }

  void stop_when_idle() {
    const bool is_late = std::chrono::steady_clock::now() >= drain_until_;
    drain_timer_.expires_after(kDrainCheck);
    drain_timer_.async_wait([this, is_last = is_late || frontend_->num_requests() == 0](const boost::system::error_code&) {
      is_last ? stop() : stop_when_idle();  // one more round after the last answer, for its bytes to leave
    });
  }

  void stop() {
    ranks_->stop([this] { io_.stop(); });
  }

  const Options& options_;
  const NodeConfig config_;
  SteadyClock clock_;
  Registry metrics_;
  asio::io_context io_{1};
  asio::signal_set signals_{io_, SIGINT, SIGTERM};
  asio::steady_timer drain_timer_{io_};
  std::chrono::steady_clock::time_point drain_until_{};
  api::ServedText served_;
  std::unique_ptr<api::OtlpExporter> exporter_;
  std::unique_ptr<router::RoutedWorker> router_;
  std::unique_ptr<api::Frontend> frontend_;
  std::unique_ptr<api::HttpServer> server_;
  struct RankWorker {
    std::string url;
    router::WorkerId id;
  };
  std::map<group::RankId, RankWorker> workers_;
  group::GroupStatus status_;
  std::unique_ptr<cluster::RankProcesses> ranks_;
  std::unique_ptr<group::Coordinator> coordinator_;  // first to go: it posts to io_
  std::optional<Error> fault_;
};

}  // namespace

int run_node(const Options& options, const NodeConfig& config) {
  NodeServer server(options, config);
  const Status status = server.run();
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", status.error().message.c_str());
  return 1;
}

}  // namespace tandem::commands
