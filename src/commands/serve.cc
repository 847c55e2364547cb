// tandem serve: one engine behind the OpenAI API; or, with several ranks, the process that starts them (serve_node.h).
//
// Order of start: options, config.json, tokenizer and every tensor header are checked before the port opens; the port
// answers /health with 503 and the progress while weights load; requests are taken once the engine runs.
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "src/api/frontend.h"
#include "src/api/http_server.h"
#include "src/api/served_text.h"
#include "src/base/log.h"
#include "src/base/version.h"
#include "src/commands/commands.h"
#include "src/commands/followers.h"
#include "src/commands/loading_bar.h"
#include "src/commands/rank.h"
#include "src/commands/serve_node.h"
#include "src/commands/serve_text.h"
#include "src/commands/server_common.h"
#include "src/group/coordinator.h"
#include "src/commands/shutdown.h"

namespace tandem::commands {
namespace {

// Columns, since there are many.
std::string steps_json(const std::vector<engine::StepTimes>& steps) {
  nlohmann::json rows = nlohmann::json::array();
  for (const engine::StepTimes& step : steps) {
    rows.push_back({step.round, step.begin_us, step.total_us, step.wait_us, step.ride_us, step.ride_bytes,
                    step.compute_us, step.rows});
  }
  const nlohmann::json json = {
      {"columns", {"round", "begin_us", "total_us", "wait_us", "ride_us", "ride_bytes", "compute_us", "rows"}},
      {"steps", std::move(rows)}};
  return json.dump();
}

class Server {
 public:
  explicit Server(const Options& options) : options_(options) {}
  ~Server() {
    if (loader_.joinable()) loader_.join();
  }

  Status run() {
    TANDEM_ASSIGN(RankConfig config, make_rank_config(options_));
    TANDEM_ASSIGN(served_, load_served_text(options_, config));
    TANDEM_ASSIGN(exporter_, open_exporter(options_, "tandem-serve", io_, registry_));
    config.spans = exporter_.get();
    config.model_name = served_.model.names.front();
    TANDEM_TRY(open_coordinator(config));
    group_ = config.group;
    if (const int64_t count = options_.integer("api-server-count"); count > 1) {
      log_info("serve", "--api-server-count {}: an engine has one front end; several are for nodes with several ranks", count);
    }
    load_in_background(std::move(config));
    TANDEM_TRY(wait_until_checked());
    Status opened = open_port();
    if (opened.ok()) opened = open_followers();
    if (!opened.ok()) {
      // The loader cannot be interrupted and owns nothing that outlives the process.
      std::fprintf(stderr, "%s\n", opened.error().message.c_str());
      std::_Exit(1);
    }
    io_.run();
    if (rank_) rank_->stop();
    frontend_.reset();
    return fault_ ? Status(*fault_) : Status();
  }

 private:
  // Where the ranks of the group meet, if it is here.
  Status open_coordinator(RankConfig& config) {
    if (!config.group || !config.group->hosts_coordinator) return {};
    group::CoordinatorOptions options;
    options.host = config.group->coordinator_host;
    options.port = config.group->coordinator_port;
    options.shape = config.group->shape;
    options.rank_timeout_us = config.group->rank_timeout_us;
    TANDEM_ASSIGN(coordinator_, group::Coordinator::listen(options));
    config.group->coordinator_port = coordinator_->port();
    return {};
  }

  // The other tensor ranks load their share meanwhile.
  Status open_followers() {
    if (!group_ || group_->shape.tensor == 1) return {};
    TANDEM_ASSIGN(followers_, start_followers(io_, options_, *group_, planned_, [this](const Error& why) {
                    fault_ = why;
                    io_.stop();
                  }));
    return {};
  }

  void load_in_background(RankConfig config) {
    config.on_planned = [this](const PlannedCache& planned) { planned_ = planned; };  // before mark_checked()
    loader_ = std::thread([this, config = std::move(config)]() mutable {
      Result<std::unique_ptr<Rank>> loaded =
          Rank::load(std::move(config), served_.tokenizer->vocab_size(), clock_, registry_, [this](double fraction) {
            progress_ = fraction;
            bar_.show(fraction);
            mark_checked();
          });
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (loaded.ok()) {
          rank_ = std::move(loaded).value();
        } else {
          fault_ = loaded.error();
        }
      }
      mark_checked();
      boost::asio::post(io_, [this] { finish_loading(); });
    });
  }

  void mark_checked() {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_checked_ = true;
    changed_.notify_all();
  }

  Status wait_until_checked() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return is_checked_; });
    return fault_ ? Status(*fault_) : Status();
  }

  Status open_port() {
    api::FrontendOptions front = frontend_options(options_, served_.model.names.front());
    front.policy.accepts_kv_transfer = !options_.text("kv-transfer-config").empty();
    if (group_) {
      front.first_rank = group_->data_rank();
      front.num_ranks = 1;
    }
    front.health = [this] { return health(); };
    front.spans = exporter_.get();
    frontend_ = std::make_unique<api::Frontend>(io_, std::move(front), clock_, registry_);
    TANDEM_ASSIGN(server_,
                  api::HttpServer::listen(io_, options_.text("host"), static_cast<uint16_t>(options_.integer("port")),
                                          frontend_->http_options()));
    frontend_->add_routes(*server_);
    server_->add_route({"GET", "/expert_load", true, [this](std::shared_ptr<api::HttpExchange> exchange) {
                          exchange->respond(show_expert_load());
                        }});
    server_->add_route({"GET", "/steps", true, [this](std::shared_ptr<api::HttpExchange> exchange) {
                          exchange->respond(show_steps());
                        }});
    server_->start();
    shutdown_.emplace(
        io_, "serve", options_.number("shutdown-timeout"),
        drain_frontend([this] { return is_serving_ ? frontend_.get() : nullptr; }), [this] { stop(); });
    return {};
  }

  api::HttpResponse show_expert_load() const {
    if (!is_serving_) return api::error_response(make_error(ErrorKind::kUnavailable, "the model is loading"));
    if (rank_->expert_load() == nullptr && rank_->balancer() == nullptr) {
      return api::error_response(make_error(
          ErrorKind::kNotFound, "expert loads are not recorded; start the server with --record-expert-load FILE, or a "
                                "group of ranks with --enable-eplb"));
    }
    const std::shared_ptr<const eplb::LoadReport> group =
        rank_->balancer() == nullptr ? nullptr : rank_->balancer()->load_report();
    if (rank_->expert_load() == nullptr && group == nullptr) {
      return api::error_response(make_error(ErrorKind::kUnavailable,
                                            "the loads of a group are shown by rank 0, after its first {} steps",
                                            ep::Balancer::kStepsPerReport));
    }
    api::HttpResponse response;
    response.body = expert_load_json(served_.model.names.front(), rank_->info(), rank_->expert_load(), group.get());
    return response;
  }

  api::HttpResponse show_steps() const {
    if (!is_serving_) return api::error_response(make_error(ErrorKind::kUnavailable, "the model is loading"));
    api::HttpResponse response;
    response.body = steps_json(rank_->engine().step_log().steps());
    return response;
  }

  api::Health health() const {
    if (!is_serving_) return {false, "loading", progress_.load()};
    if (const Status group = rank_->group_status(); !group.ok()) {
      return {false, "waiting for the group: " + group.error().message, std::nullopt};
    }
    return {true, "ok", std::nullopt};
  }

  // On the I/O thread, once the loader has ended.
  void finish_loading() {
    if (fault_) {
      io_.stop();
      return;
    }
    const std::string address = fmt::format("{}:{}", options_.text("host"), server_->port());
    if (group_) {
      if (Status joined = rank_->join_group(address, registry_); !joined.ok()) {
        fault_ = joined.error();
        return io_.stop();
      }
    }
    rank_->start();
    frontend_->open(served_, rank_->engine());
    is_serving_ = true;
    log_info("serve", "serving {} on http://{}:{}", served_.model.names.front(), options_.text("host"),
             server_->port());
  }

  void stop() {
    if (!is_serving_) std::_Exit(0);  // the loader cannot be interrupted
    server_->close();
    rank_->stop();  // before the other tensor ranks go, which it would miss
    followers_ == nullptr ? io_.stop() : followers_->stop([this] { io_.stop(); });
  }

  const Options& options_;
  SteadyClock clock_;
  Registry registry_;
  boost::asio::io_context io_{1};
  std::optional<Shutdown> shutdown_;
  api::ServedText served_;
  LoadingBar bar_{"loading weights"};
  std::atomic<double> progress_{0};
  bool is_serving_ = false;
  std::optional<GroupConfig> group_;
  PlannedCache planned_;  // of the loader, until is_checked_

  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_checked_ = false;
  std::optional<Error> fault_;

  std::unique_ptr<api::OtlpExporter> exporter_;
  std::unique_ptr<group::Coordinator> coordinator_;
  std::unique_ptr<Rank> rank_;
  std::unique_ptr<cluster::RankProcesses> followers_;
  std::unique_ptr<api::Frontend> frontend_;
  std::unique_ptr<api::HttpServer> server_;
  std::thread loader_;
};

}  // namespace

int run_serve(const Options& options) {
  start_log(options);
  log_info("serve", "tandem {} {}", kVersion, options.changed_json());
  // Before any thread starts: each takes the niceness of its creator.
  const int niceness = static_cast<int>(options.integer("nice"));
  if (niceness > 0 && ::setpriority(PRIO_PROCESS, 0, niceness) != 0) {
    std::fprintf(stderr, "--nice %d was refused by the system: %s\n", niceness, std::strerror(errno));
    return 1;
  }
  const Result<RankOptions> ranks = read_rank_options(options);
  if (!ranks.ok()) {
    std::fprintf(stderr, "%s\n", ranks.error().message.c_str());
    return 1;
  }
  if (ranks->group && ranks->group->is_follower()) return run_follower(options);
  // Those of a node's front end go on to its ranks.
  const int64_t max_requests = api::FrontendOptions().max_concurrent_requests;
  raise_descriptors("serve", ranks->node ? 2 * max_requests : max_requests,
                    fmt::format("{} requests, as many as are served at once,", max_requests));
  if (ranks->node) return run_node(options, *ranks->node);
  Server server(options);
  const Status status = server.run();
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.error().message.c_str());
    return 1;
  }
  return 0;
}

}  // namespace tandem::commands
