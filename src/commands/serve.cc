// tandem serve: one engine behind the OpenAI API.
//
// Order of start: options, config.json, tokenizer and every tensor header are checked before the port opens; the port
// answers /health with 503 and the progress while weights load; requests are taken once the engine runs.
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "src/api/frontend.h"
#include "src/api/http_server.h"
#include "src/api/served_text.h"
#include "src/base/log.h"
#include "src/base/version.h"
#include "src/commands/commands.h"
#include "src/commands/loading_bar.h"
#include "src/commands/rank.h"
#include "src/commands/server_common.h"
#include "src/text/text_bundle.h"

namespace tandem::commands {
namespace {

// Random weights need no trained tokenizer. Where the folder has none, token i is written "ti", so that every id still
// has a text of its own.
text::TextBundle make_dummy_text(const model::ModelConfig& config) {
  nlohmann::json vocabulary;
  for (int64_t id = 0; id < config.vocab_size; ++id) vocabulary["t" + std::to_string(id)] = id;
  text::TextBundle bundle;
  bundle.tokenizer_json = nlohmann::json{{"version", "1.0"},
                                         {"added_tokens", nlohmann::json::array()},
                                         {"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
                                         {"model", {{"type", "WordLevel"}, {"vocab", vocabulary}, {"unk_token", "t0"}}}}
                              .dump();
  bundle.config_json = nlohmann::json{{"eos_token_id", config.generation.eos_token_ids}}.dump();
  return bundle;
}

Result<text::TextBundle> load_text(const std::string& path, const RankConfig& config) {
  const bool has_tokenizer = std::filesystem::exists(std::filesystem::path(path) / "tokenizer.json");
  if (config.load.format != model::LoadFormat::kDummy || has_tokenizer) return text::TextBundle::load(path);
  log_info("serve", "{} has no tokenizer.json: token i is written \"ti\"", path);
  return make_dummy_text(config.model);
}

class Server {
 public:
  explicit Server(const Options& options) : options_(options) {}
  ~Server() {
    if (loader_.joinable()) loader_.join();
  }

  Status run() {
    TANDEM_ASSIGN(RankConfig config, make_rank_config(options_));
    TANDEM_TRY(read_text(config));
    TANDEM_ASSIGN(exporter_, open_exporter(options_, "tandem-serve", io_, registry_));
    config.spans = exporter_.get();
    config.model_name = served_.model.names.front();
    load_in_background(std::move(config));
    TANDEM_TRY(wait_until_checked());
    if (Status opened = open_port(); !opened.ok()) {
      // The loader cannot be interrupted and owns nothing that outlives the process.
      std::fprintf(stderr, "%s\n", opened.error().message.c_str());
      std::_Exit(1);
    }
    io_.run();
    if (rank_) rank_->engine().stop();
    frontend_.reset();
    return fault_ ? Status(*fault_) : Status();
  }

 private:
  Status read_text(const RankConfig& config) {
    const std::string& path = options_.text("model");
    TANDEM_ASSIGN(text::TextBundle bundle, load_text(path, config));
    api::ServedModelFacts facts;
    facts.names = options_.list("served-model-name");
    if (facts.names.empty()) facts.names.push_back(default_model_name(path));
    facts.root = path;
    facts.max_model_len = config.load.max_model_len == 0 ? config.model.max_positions : config.load.max_model_len;
    if (facts.max_model_len < 2) {
      return invalid_argument("max-model-len",
                              "--max-model-len is {}, but a prompt and its answer have at least one token each; raise it "
                              "to 2 or more, or leave it out to take config.json's {}",
                              facts.max_model_len, config.model.max_positions);
    }
    facts.vocab_size = config.model.vocab_size;
    TANDEM_ASSIGN(served_, api::make_served_text(std::move(facts), std::move(bundle)));
    if (served_.tokenizer->vocab_size() > config.model.vocab_size) {
      return invalid_argument("tokenizer.json",
                              "{}/tokenizer.json knows ids up to {}, vocab_size in config.json is {}: the files do not "
                              "belong together",
                              path, served_.tokenizer->vocab_size() - 1, config.model.vocab_size);
    }
    return {};
  }

  void load_in_background(RankConfig config) {
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
    server_->start();
    signals_.async_wait([this](const boost::system::error_code& error, int signal) {
      if (!error) shut_down(signal);
    });
    return {};
  }

  api::HttpResponse show_expert_load() const {
    if (!is_serving_) return api::error_response(make_error(ErrorKind::kUnavailable, "the model is loading"));
    if (rank_->expert_load() == nullptr) {
      return api::error_response(make_error(
          ErrorKind::kNotFound, "expert loads are not recorded; start the server with --record-expert-load FILE"));
    }
    api::HttpResponse response;
    response.body = expert_load_json(*rank_->expert_load());
    return response;
  }

  api::Health health() const {
    if (is_serving_) return {true, "ok", std::nullopt};
    return {false, "loading", progress_.load()};
  }

  // On the I/O thread, once the loader has ended.
  void finish_loading() {
    if (fault_) {
      io_.stop();
      return;
    }
    rank_->engine().start();
    frontend_->open(served_, rank_->engine());
    is_serving_ = true;
    log_info("serve", "serving {} on http://{}:{}", served_.model.names.front(), options_.text("host"),
             server_->port());
  }

  void shut_down(int signal) {
    log_info("serve", "{}: shutting down", signal == SIGINT ? "interrupted" : "terminated");
    if (!is_serving_) std::_Exit(0);  // the loader cannot be interrupted
    frontend_->close(make_error(ErrorKind::kUnavailable, "the server is shutting down; try another one"));
    // The answers above get a moment to leave; whoever reads slower is cut.
    linger_.expires_after(std::chrono::milliseconds(200));
    linger_.async_wait([this](const boost::system::error_code&) {
      server_->close();
      io_.stop();
    });
  }

  const Options& options_;
  SteadyClock clock_;
  Registry registry_;
  boost::asio::io_context io_{1};
  boost::asio::signal_set signals_{io_, SIGINT, SIGTERM};
  boost::asio::steady_timer linger_{io_};
  api::ServedText served_;
  LoadingBar bar_{"loading weights"};
  std::atomic<double> progress_{0};
  bool is_serving_ = false;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_checked_ = false;
  std::optional<Error> fault_;

  std::unique_ptr<api::OtlpExporter> exporter_;
  std::unique_ptr<Rank> rank_;
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
  Server server(options);
  const Status status = server.run();
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.error().message.c_str());
    return 1;
  }
  return 0;
}

}  // namespace tandem::commands
