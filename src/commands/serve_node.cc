#include "src/commands/serve_node.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <thread>

#include "src/base/log.h"
#include "src/base/version.h"
#include "src/cluster/process.h"
#include "src/cluster/rank_processes.h"
#include "src/comm/address.h"
#include "src/comm/meeting.h"
#include "src/commands/node_front_end.h"
#include "src/commands/serve_text.h"
#include "src/commands/server_common.h"
#include "src/commands/shutdown.h"
#include "src/group/coordinator.h"

namespace tandem::commands {
namespace {

namespace asio = boost::asio;

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
  static constexpr std::array<std::string_view, 7> kOwn{
      "host", "port", "log-name", "otlp-endpoint", "config", "secret-config", "record-expert-load"};
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
    if (const std::string& path = options.text("record-expert-load"); !path.empty()) {
      process.arguments.insert(process.arguments.end(), {"--record-expert-load", fmt::format("{}.rank{}", path, rank)});
    }
    ranks.push_back(std::move(process));
  }
  return ranks;
}

class NodeServer {
 public:
  NodeServer(const Options& options, const NodeConfig& config) : options_(options), config_(config) {}
  ~NodeServer() { close_front_ends(); }
  NodeServer(const NodeServer&) = delete;
  NodeServer& operator=(const NodeServer&) = delete;

  Status run() {
    // The ranks check the options again; here a fault is told before anything is started.
    TANDEM_ASSIGN(RankConfig rank_config, make_rank_config(options_));
    if (config_.has_front_end) {
      TANDEM_ASSIGN(served_, load_served_text(options_, rank_config));
    }
    TANDEM_ASSIGN(exporter_, open_exporter(options_, "tandem-serve", io_, metrics_));
    int64_t coordinator_port = config_.coordinator_port;
    if (config_.has_front_end) TANDEM_TRY(open_front_ends());
    if (config_.hosts_coordinator) {
      TANDEM_TRY(open_coordinator());
      coordinator_port = coordinator_->port();
    }
    TANDEM_ASSIGN(const std::string host, own_address_facing(config_.coordinator_host));
    std::vector<int64_t> ports(static_cast<size_t>(config_.num_ranks), 0);  // any; the coordinator hears which
    if (config_.has_front_end && !config_.hosts_coordinator) TANDEM_TRY(choose_ports(host, ports));
    ranks_ = std::make_unique<cluster::RankProcesses>(io_, cluster::kOwnProgram,
                                                      plan_ranks(options_, config_, host, ports, coordinator_port),
                                                      [this](const Error& why) { give_up(why); });
    const Shutdown shutdown(
        io_, "serve", options_.number("shutdown-timeout"),
        {[this] { return !front_ends_.empty(); }, [this] { return num_requests(); },
         [this](const Error& why) { for_each_front_end([why](NodeFrontEnd& front_end) { front_end.drain(why); }); },
         [this](const Error& why) { for_each_front_end([why](NodeFrontEnd& front_end) { front_end.close(why); }); }},
        [this] { stop(); });
    TANDEM_TRY(ranks_->start());
    for (const std::unique_ptr<Thread>& more : more_) more->thread = std::thread([&io = more->io] { io.run(); });
    io_.run();
    return fault_ ? Status(*fault_) : Status();
  }

 private:
  Status open_front_ends() {
    const int64_t count = std::max<int64_t>(1, options_.integer("api-server-count"));
    front_end_options_.emplace(NodeFrontEndOptions{options_, config_, served_, exporter_.get(), count, [this] {
                                                     return num_requests();
                                                   }});
    for (int64_t i = 0; i < count; ++i) {
      if (i > 0) more_.push_back(std::make_unique<Thread>());
      asio::io_context& io = i == 0 ? io_ : more_.back()->io;
      NodeFrontEnd* const first = i == 0 ? nullptr : front_ends_.front().get();
      TANDEM_ASSIGN(std::unique_ptr<NodeFrontEnd> front_end,
                    NodeFrontEnd::open(io, *front_end_options_, i, first, clock_, metrics_));
      front_ends_.push_back(std::move(front_end));
    }
    log_info("serve", "serving {} on http://{}:{} with {} ranks{}", served_.model.names.front(), options_.text("host"),
             front_ends_.front()->port(), config_.shape.data,
             count > 1 ? fmt::format(" and {} front ends", count) : std::string());
    return {};
  }

  int64_t num_requests() const {
    int64_t sum = 0;
    for (const std::unique_ptr<NodeFrontEnd>& front_end : front_ends_) sum += front_end->num_requests();
    return sum;
  }

  // Runs `action` for each front end, on its thread. From the main thread.
  void for_each_front_end(const std::function<void(NodeFrontEnd&)>& action) {
    for (size_t i = 0; i < front_ends_.size(); ++i) {
      asio::post(i == 0 ? io_ : more_[i - 1]->io, [action, front_end = front_ends_[i].get()] { action(*front_end); });
    }
  }

  // The main thread's io_context does not run any more.
  void close_front_ends() {
    if (front_ends_.empty()) return;
    const Error why = make_error(ErrorKind::kUnavailable, "the server is shutting down");
    front_ends_.front()->close(why);
    for (size_t i = 0; i < more_.size(); ++i) {
      asio::post(more_[i]->io, [why, front_end = front_ends_[i + 1].get(), &io = more_[i]->io] {
        front_end->close(why);
        io.stop();
      });
    }
    for (const std::unique_ptr<Thread>& more : more_) {
      if (more->thread.joinable()) more->thread.join();
    }
  }

  // A node with an endpoint but without the coordinator knows where its ranks listen only if it says so itself.
  Status choose_ports(const std::string& host, std::vector<int64_t>& ports) {
    for (size_t i = 0; i < ports.size(); ++i) {
      TANDEM_ASSIGN(ports[i], find_free_port(host));
      const int32_t rank = config_.first_rank + static_cast<int32_t>(i);
      const std::string url = fmt::format("http://{}:{}", host, ports[i]);
      for (const std::unique_ptr<NodeFrontEnd>& front_end : front_ends_) TANDEM_TRY(front_end->add_rank(rank, url));
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

  void take_status(const group::GroupStatus& status) {
    for (const group::MemberStatus& member : status.members) {
      if (status.standing) ranks_->mark_ready(member.rank.value / config_.shape.tensor);
    }
    for_each_front_end([status](NodeFrontEnd& front_end) { front_end.take_status(status); });
  }

  void give_up(const Error& why) {
    fault_ = why;
    stop();
  }

  void stop() {
    ranks_->stop([this] { io_.stop(); });
  }

  // Of a front end beyond the first.
  struct Thread {
    asio::io_context io{1};
    asio::executor_work_guard<asio::io_context::executor_type> work{io.get_executor()};
    std::thread thread;
  };

  const Options& options_;
  const NodeConfig config_;
  SteadyClock clock_;
  Registry metrics_;
  asio::io_context io_{1};
  api::ServedText served_;
  std::unique_ptr<api::OtlpExporter> exporter_;
  std::optional<NodeFrontEndOptions> front_end_options_;
  std::vector<std::unique_ptr<Thread>> more_;
  std::vector<std::unique_ptr<NodeFrontEnd>> front_ends_;  // the first on the main thread, the others on more_
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
